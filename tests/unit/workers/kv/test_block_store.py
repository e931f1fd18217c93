"""Stored blocks against plain indexing of the cache, in other layouts, and while others write and remove."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.stage.messages import Span
from tests.support.rigs.kv_shard import DTYPES, HEADS, KEY, LAYERS, PAGES, WHOLE, Shard, block_of, file_of, parts
from workers.kv.block_file import Part
from workers.kv.open_file import BadBlock


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "scattered"), [(1, True), (16, False), (64, True)])
@pytest.mark.parametrize(("written", "read"), [((2, 2), (1, 4)), ((2, 2), (4, 1)), ((2, 2), (1, 1)), ((1, 1), (3, 2))])
def test_a_block_comes_back_in_any_layout(
    tmp_path: Path, dtype: str, page_size: int, scattered: bool, written: tuple[int, int], read: tuple[int, int]
):
    block = block_of(page_size, scattered=scattered)
    expected = {}
    for seed, part in enumerate(parts(*written)):
        shard = Shard(tmp_path, part, dtype, page_size, seed=seed)
        assert shard.store.find([block.key]) == 0
        outcome = shard.store.store(block, shard.pages)
        assert (outcome.blocks, outcome.problem) == (1, "")
        assert outcome.num_bytes == file_of(tmp_path, part).stat().st_size
        expected |= shard.content(block)
    elsewhere = replace(block, pages=block_of(page_size, first=11, scattered=not scattered).pages)
    for part in parts(*read):
        shard = Shard(tmp_path, part, dtype, page_size, seed=99)
        untouched = replace(block, pages=tuple(set(range(PAGES)) - set(elsewhere.pages)))
        before = shard.content(untouched)
        assert shard.store.find([block.key, b"x" * 32]) == shard.store.count() == 1
        outcome = shard.store.load(elsewhere, shard.pages)
        assert (outcome.blocks, outcome.damaged, outcome.problem) == (1, 0, "")
        found = shard.content(elsewhere)
        assert outcome.num_bytes == sum(tensor.nbytes for tensor in found.values())
        assert all(torch.equal(tensor, expected[at]) for at, tensor in found.items())
        assert all(torch.equal(tensor, before[at]) for at, tensor in shard.content(untouched).items())


@pytest.mark.parametrize("pages", [(0, 1, 2), (0, 1, 2, PAGES), (-1, 0, 1, 2), (0, 1, 2, 2)])
def test_pages_that_are_not_a_block_are_refused(tmp_path: Path, pages: tuple[int, ...]):
    shard = Shard(tmp_path)
    for call in (shard.store.store, shard.store.load):
        with pytest.raises(ValueError, match="pages"):
            call(replace(block_of(), pages=pages), shard.pages)


def test_a_block_counts_only_whole(tmp_path: Path):
    block = block_of()
    half = Shard(tmp_path, Part(Span(0, LAYERS), Span(0, 2)))
    half.store.store(block, half.pages)
    whole = Shard(tmp_path)
    assert (half.store.find([block.key]), whole.store.find([block.key])) == (1, 0)
    outcome = whole.store.load(block, whole.pages)
    assert (outcome.blocks, outcome.damaged) == (0, 0)
    assert "every layer and head" in outcome.problem


def test_ranks_with_the_same_head_write_one_file(tmp_path: Path):
    first, second = Shard(tmp_path, WHOLE, seed=1), Shard(tmp_path, WHOLE, seed=1)
    assert first.store.store(block_of(), first.pages).num_bytes > 0
    again = second.store.store(block_of(), second.pages)
    assert (again.blocks, again.num_bytes) == (1, 0)
    assert len(list(file_of(tmp_path).parent.iterdir())) == 1


# --- others, and the disk --------------------------------------------------------------------------------------------


def test_two_writers_and_a_remover_at_once(tmp_path: Path):
    shards = [Shard(tmp_path, seed=1) for _ in range(3)]
    block, stop = block_of(), threading.Event()

    def write(shard: Shard) -> None:
        while not stop.is_set():
            shard.store.store(block, shard.pages)

    threads = [threading.Thread(target=write, args=(shard,)) for shard in shards[:2]]
    for thread in threads:
        thread.start()
    reader, loaded = Shard(tmp_path, seed=5), 0
    expected, limit = shards[0].content(block), time.monotonic() + 20
    while loaded < 30 and time.monotonic() < limit:
        outcome = reader.store.load(block, reader.pages)
        assert not outcome.damaged, outcome.problem
        if outcome.blocks:
            loaded += 1
            assert all(torch.equal(tensor, expected[at]) for at, tensor in reader.content(block).items())
            shards[2].store.drop([block.key])
    stop.set()
    for thread in threads:
        thread.join()
    assert loaded == 30  # however often a writer found its folder gone
    shards[2].store.drop([block.key])
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(("code", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_disk_that_cannot_take_a_block_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_full: bool
):
    shard, left = Shard(tmp_path), [3]
    write = os.pwrite

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", failing)
    outcome = shard.store.store(block_of(), shard.pages)
    assert (outcome.blocks, outcome.num_bytes, outcome.is_full) == (0, 0, is_full)
    assert os.strerror(code) in outcome.problem
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    left[0] = 10**6  # short writes
    assert shard.store.store(block_of(), shard.pages).blocks == 1
    monkeypatch.undo()
    assert shard.store.load(block_of(), shard.pages).blocks == 1


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_open_umask")
def test_everything_is_private(tmp_path: Path):
    (tmp_path / "v1").mkdir(mode=0o755)
    shard = Shard(tmp_path)
    shard.store.store(block_of(), shard.pages)
    data = file_of(tmp_path).read_bytes()
    shard.store.receive(KEY, WHOLE.name, iter([data]))
    for path in (tmp_path / "v1").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "v1").stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Shard(tmp_path / "file")


# --- listing, removing, copies ---------------------------------------------------------------------------------------


def test_blocks_are_listed_and_removed(tmp_path: Path):
    shard, keys = Shard(tmp_path), [bytes([at]) * 32 for at in range(3)]
    for key in keys:
        assert shard.store.store(block_of(key=key), shard.pages).blocks == 1
    os.utime(file_of(tmp_path, key=keys[1]).parent, (5, 5))
    listed = {entry.key: entry for entry in shard.store.entries()}
    size = file_of(tmp_path, key=keys[0]).stat().st_size
    assert set(listed) == set(keys)
    assert all((e.parent, e.start, e.num_bytes) == (b"p" * 32, 640, size) for e in listed.values())
    assert listed[keys[1]].used == 5
    shard.store.load(block_of(key=keys[1]), shard.pages)
    assert {e.key: e.used for e in shard.store.entries()}[keys[1]] == pytest.approx(time.time(), abs=60)
    os.utime(file_of(tmp_path, key=keys[1]).parent, (5, 5))
    assert shard.store.touch([*keys, b"n" * 32]) == 3
    assert {e.key: e.used for e in shard.store.entries()}[keys[1]] == pytest.approx(time.time(), abs=60)
    assert shard.store.drop([*keys[:2], b"n" * 32]).blocks == 2
    assert [entry.key for entry in shard.store.entries()] == keys[2:]
    shard.store.drop(keys)
    assert [path for path in (tmp_path / "v1").iterdir() if path.is_dir()] == []


def test_a_block_is_removed_while_another_head_ends_a_file_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shard, block, lstat = Shard(tmp_path), block_of(), Path.lstat
    shard.store.store(block, shard.pages)
    folder = file_of(tmp_path).parent
    (folder / f".{'0' * 16}.tmp").write_bytes(b"x")

    def renamed(path: Path) -> os.stat_result:
        if path.suffix == ".tmp":
            path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", renamed)
    assert (shard.store.drop([block.key]).blocks, folder.exists()) == (1, False)


def test_something_else_in_the_place_of_a_block_is_removed_too(tmp_path: Path):
    shard, folder = Shard(tmp_path), file_of(tmp_path).parent
    folder.parent.mkdir()
    folder.write_text("no folder")
    outcome = shard.store.drop([block_of().key])
    assert (outcome.blocks, outcome.problem, folder.parent.exists()) == (1, "", False)


def test_what_dead_writers_left_is_removed(tmp_path: Path):
    shard = Shard(tmp_path)
    shard.store.store(block_of(), shard.pages)
    old, new = (file_of(tmp_path).parent / f".{digit * 16}.tmp" for digit in "ab")
    for path in (old, new):
        path.write_text("x")
    os.utime(old, (time.time() - 7200,) * 2)
    (tmp_path / "v1" / "zz").mkdir()
    assert len(list(shard.store.entries())) == 1
    assert (old.exists(), new.exists(), (tmp_path / "v1" / "zz").exists()) == (False, True, False)


def test_stores_are_told_apart(tmp_path: Path):
    one, same, other = Shard(tmp_path / "a"), Shard(tmp_path / "a"), Shard(tmp_path / "b")
    assert one.store.identity() == same.store.identity() != other.store.identity()
    (one.store.root / "id").write_text("")
    assert one.store.identity() == same.store.identity() != ""


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_stores_without_hard_links_are_told_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    one, same, other = Shard(tmp_path / "a"), Shard(tmp_path / "a"), Shard(tmp_path / "b")
    assert len(one.store.identity()) == 32
    assert one.store.identity() == same.store.identity() != other.store.identity()
    assert os.listdir(one.store.root) == ["id"]
    assert stat.S_IMODE((one.store.root / "id").stat().st_mode) == 0o600


def test_files_are_copied_to_another_store(tmp_path: Path):
    here, there = Shard(tmp_path / "a"), Shard(tmp_path / "b", seed=3)
    here.store.store(block_of(), here.pages)
    (path,) = here.store.files(KEY)
    there.store.receive(KEY, path.name, here.store.pieces(path, 1000))
    assert there.store.load(block_of(), there.pages).blocks == 1
    assert all(torch.equal(a, here.content(block_of())[at]) for at, a in there.content(block_of()).items())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("../../x.safetensors", KEY), ("l0-5_h0-4.safetensors/..", KEY), ("l0-6_h0-4.safetensors", KEY), ("", KEY),
        ("l0-05_h0-4.safetensors", KEY), ("l2-2_h0-4.safetensors", KEY), ("l0-4_h0-4.safetensors", KEY),
        (WHOLE.name, b"o" * 32), (WHOLE.name, b"short"), (".0123456789abcdef.tmp", KEY), (f"{WHOLE.name}\n", KEY),
    ],
    ids=range(11),
)  # fmt: skip
def test_received_files_must_be_what_they_are_named(tmp_path: Path, name: str, key: bytes):
    here, there = Shard(tmp_path / "a"), Shard(tmp_path / "b")
    here.store.store(block_of(), here.pages)
    pieces = here.store.pieces(file_of(tmp_path / "a"), 1000)
    with pytest.raises(BadBlock):
        there.store.receive(key, name, pieces)
    assert next(pieces, None) is None, "the rest of the file is read"
    assert [path for path in (tmp_path / "b").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("damage", ["flip", "cut", "endless"])
def test_damaged_received_files_are_not_kept(tmp_path: Path, damage: str):
    here, there = Shard(tmp_path / "a"), Shard(tmp_path / "b")
    here.store.store(block_of(), here.pages)
    data = file_of(tmp_path / "a").read_bytes()
    size = there.shape.max_bytes(WHOLE) + 1
    pieces = {"flip": [data[:-1] + b"?"], "cut": [data[:-1]], "endless": [data, b"\0" * size]}[damage]
    with pytest.raises(BadBlock):
        there.store.receive(KEY, WHOLE.name, iter(pieces))
    assert [path for path in (tmp_path / "b").rglob("*") if path.is_file()] == []


def test_only_files_that_a_shard_wants_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block = block_of(1, 2)
    halves = [Part(Span(0, 1), Span(0, HEADS)), Part(Span(1, LAYERS), Span(0, HEADS))]
    for part in halves:
        shard = Shard(tmp_path, part, "float32", 1)
        assert shard.store.store(block, shard.pages).blocks == 1
    read = list[Path]()
    monkeypatch.setattr("workers.kv.block_store.read_ahead", read.extend)
    for part, expected in ((halves[0], halves[:1]), (halves[1], halves[1:]), (parts(1, 1)[0], halves)):
        read.clear()
        Shard(tmp_path, part, "float32", 1).store.read_ahead([block.key, bytes(32)])
        assert sorted(path.name for path in read) == sorted(one.name for one in expected)
