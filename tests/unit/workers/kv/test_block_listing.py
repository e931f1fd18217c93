"""What a listing says of blocks, whatever else is in their folder, and that it reads each header once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.rigs.kv_shard import Shard, block_of, file_of
from workers.kv import block_listing as module
from workers.kv.block_listing import BlockListing, remove_if_empty

KEYS = [bytes([at]) * 32 for at in range(4)]


def stored(folder: Path) -> tuple[Shard, BlockListing]:
    shard = Shard(folder)
    for key in KEYS:
        assert shard.store.store(block_of(key=key), shard.pages).blocks == 1
    return shard, BlockListing(folder / "v1", shard.shape)


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of files whose header was read."""
    read, read_info = list[str](), module.read_info

    def noted(path: Path, *args: object) -> object:
        read.append(path.parent.name)
        return read_info(path, *args)

    monkeypatch.setattr(module, "read_info", noted)
    return read


def test_the_header_of_a_block_is_read_once(tmp_path: Path, headers: list[str]) -> None:
    shard, listing = stored(tmp_path)
    first = list(listing.entries())
    assert [(entry.key, entry.parent, entry.start) for entry in first] == [(key, b"p" * 32, 640) for key in KEYS]
    assert headers == [key.hex() for key in KEYS]
    headers.clear()
    shard.store.drop(KEYS[:1])
    assert list(listing.entries()) == first[1:]
    assert headers == []
    shard.store.store(block_of(key=KEYS[0]), shard.pages)
    (again, *_) = listing.entries()
    assert again._replace(used=0) == first[0]._replace(used=0)
    assert headers == [KEYS[0].hex()], "what is gone is forgotten"


def test_a_listing_that_is_broken_off_loses_nothing(tmp_path: Path, headers: list[str]) -> None:
    _, listing = stored(tmp_path)
    expected = list(listing.entries())
    headers.clear()
    next(listing.entries())
    assert list(listing.entries()) == expected
    assert headers == []


def test_size_and_time_are_looked_up_each_time(tmp_path: Path) -> None:
    _, listing = stored(tmp_path)
    (before, *_) = listing.entries()
    folder = file_of(tmp_path, key=KEYS[0]).parent
    (folder / "more").write_bytes(b"12345")
    os.utime(folder, (7, 7))
    (after, *_) = listing.entries()
    assert (after.num_bytes, after.used) == (before.num_bytes + 5, 7)


def test_a_bad_file_says_nothing_and_another_one_does(tmp_path: Path, headers: list[str]) -> None:
    _, listing = stored(tmp_path)
    good = file_of(tmp_path, key=KEYS[0])
    bad = good.with_name("l0-1_h0-1.safetensors")
    bad.write_bytes(good.read_bytes().replace(KEYS[0].hex().encode(), KEYS[1].hex().encode()))
    (entry, *_) = listing.entries()
    assert (entry.parent, entry.start, entry.num_bytes) == (b"p" * 32, 640, 2 * good.stat().st_size)
    bad.unlink()
    good.write_bytes(b"nonsense")
    listing = BlockListing(tmp_path / "v1", Shard(tmp_path).shape)
    for _ in range(2):
        headers.clear()
        (entry, *_) = listing.entries()
        assert (entry.key, entry.parent, entry.start, entry.num_bytes) == (KEYS[0], b"", 0, 8)
        assert KEYS[0].hex() in headers, "another file may come"


def test_what_is_no_block_is_left_out(tmp_path: Path) -> None:
    _, listing = stored(tmp_path)
    root = tmp_path / "v1"
    good = file_of(tmp_path, key=KEYS[0]).parent
    (good.parent / ("0" * 63)).mkdir()
    (good.parent / ("00" + "1" * 62)).write_text("a file")
    (good.parent / ("00" + "2" * 62)).symlink_to(good)
    old, new = (good.parent / ("00" + digit * 62) for digit in "34")
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    (root / "0f").symlink_to(good.parent)
    (root / "0e").mkdir()
    assert [entry.key for entry in listing.entries()] == KEYS
    assert (old.exists(), new.exists(), (root / "0e").exists(), (root / "0f").is_symlink()) == (
        False,
        True,
        False,
        True,
    )
    remove_if_empty(good)
    assert good.exists()
