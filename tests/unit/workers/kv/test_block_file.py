"""Files of blocks that are damaged, foreign or no files: found, removed and counted."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from protos.stage.messages import KvBlock, Span
from tests.support.rigs.kv_shard import DTYPES, HEADS, LAYERS, Shard, block_of, file_of, parts
from workers.kv import block_file
from workers.kv.block_file import Part
from workers.kv.open_file import BadBlock


def is_refused(shard: Shard, block: KvBlock, reason: str = "") -> None:
    outcome = shard.store.load(block, shard.pages)
    assert (outcome.blocks, outcome.damaged) == (0, 1), outcome
    assert reason in outcome.problem
    assert not os.path.lexists(file_of(shard.store.root.parent, shard.part))
    assert shard.store.find([block.key]) == 0


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_every_flipped_byte_is_found(dtype: str, tmp_path: Path):
    shard, block = Shard(tmp_path, Part(Span(1, 2), Span(2, 3)), dtype, 1, dim=3), block_of(1, 2)
    path = file_of(tmp_path, shard.part)
    assert shard.store.store(block, shard.pages).blocks == 1
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        outcome = shard.store.load(block, shard.pages)
        assert (outcome.blocks, outcome.damaged) == (0, 1), at
    path.write_bytes(whole)
    assert shard.store.load(block, shard.pages).blocks == 1


def test_every_truncation_is_found(tmp_path: Path):
    shard, block = Shard(tmp_path, Part(Span(1, 2), Span(2, 3)), "bfloat16", 1, dim=3), block_of(1, 2)
    path = file_of(tmp_path, shard.part)
    shard.store.store(block, shard.pages)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        is_refused(shard, block)
    for more in (b"\0", b"\0" * 4096):
        path.write_bytes(whole + more)
        is_refused(shard, block)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parent": b""}, "parent"), ({"start": 0}, "start"), ({"token_ids": tuple(range(8, 72))}, "token_ids"),
    ],
)  # fmt: skip
def test_a_block_other_than_asked_for_is_refused(tmp_path: Path, change: dict[str, object], reason: str):
    shard, block = Shard(tmp_path), block_of()
    shard.store.store(block, shard.pages)
    is_refused(shard, replace(block, **change), reason)  # type: ignore[arg-type]


def test_a_file_of_another_key_is_refused(tmp_path: Path):
    shard, block, other = Shard(tmp_path), block_of(), block_of(key=b"o" * 32)
    shard.store.store(other, shard.pages)
    file_of(tmp_path).parent.mkdir(parents=True)
    shutil.copy(file_of(tmp_path, key=other.key), file_of(tmp_path))
    is_refused(shard, block, "not that of its folder")


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"dim": 16}])
def test_a_file_of_another_model_is_refused(tmp_path: Path, other: dict[str, object]):
    stranger, shard = Shard(tmp_path, **other), Shard(tmp_path)  # type: ignore[arg-type]
    stranger.store.store(block_of(), stranger.pages)
    is_refused(shard, block_of(), "must be")


def test_other_tokens_of_a_larger_page_are_refused(tmp_path: Path):
    small, large = Shard(tmp_path), Shard(tmp_path, page_size=64)
    small.store.store(block_of(), small.pages)
    is_refused(large, block_of(64, 128), "token_ids")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("SCHEMA", "2", "schema"), ("PAGES", "state", "reserved for recurrent state"), ("PAGES", "cells", "must be")],
)
def test_other_schemas_and_kinds_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
):
    shard = Shard(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(block_file, name, value)
        shard.store.store(block_of(), shard.pages)
    is_refused(shard, block_of(), reason)


@pytest.mark.parametrize("what", ["folder", "pipe", "link", "dangling", "huge header", "empty", "text"])
def test_what_is_no_file_of_a_block_is_removed(tmp_path: Path, what: str):
    shard, path, precious = Shard(tmp_path / "s"), file_of(tmp_path / "s"), tmp_path / "precious"
    shard.store.store(block_of(), shard.pages)
    path.rename(precious)
    if what == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif what == "pipe":
        os.mkfifo(path)
    elif what in ("link", "dangling"):
        path.symlink_to(precious if what == "link" else tmp_path / "nothing")
    else:
        header = (1 << 62).to_bytes(8, "little") + b'{"__metadata__":'
        path.write_bytes({"huge header": header, "empty": b"", "text": b"x" * 9999}[what])
    is_refused(shard, block_of())
    assert precious.exists()


def test_a_good_file_beside_a_bad_one_is_used(tmp_path: Path):
    block = block_of()
    halves = [Shard(tmp_path, part, seed=at) for at, part in enumerate(parts(1, 2))]
    for shard in halves:
        shard.store.store(block, shard.pages)
    expected = halves[0].content(block) | halves[1].content(block)
    whole = Shard(tmp_path, seed=9)
    file_of(tmp_path).write_bytes(b"bad")
    outcome = whole.store.load(block, whole.pages)
    assert (outcome.blocks, outcome.damaged) == (1, 1)
    assert all(torch.equal(tensor, expected[at]) for at, tensor in whole.content(block).items())


def test_a_file_that_is_cut_while_it_is_mapped_is_no_crash(tmp_path: Path):
    shard, block = Shard(tmp_path, dim=256), block_of()
    shard.store.store(block, shard.pages)
    path = file_of(tmp_path)
    reader = block_file.BlockReader(path, shard.shape)
    os.truncate(path, 4096)
    with pytest.raises(BadBlock, match="cannot be read"):
        reader.read(LAYERS - 1, HEADS - 1)


def test_the_library_reads_the_files(tmp_path: Path):
    for dtype in DTYPES:
        shard, block = Shard(tmp_path / dtype, dtype=dtype), block_of()
        shard.store.store(block, shard.pages)
        found, sides = load_file(file_of(tmp_path / dtype)), ("keys", "values", "key_scales", "value_scales")
        expected = {f"l{a}.h{b}.{sides[c]}": tensor for (a, b, c), tensor in shard.content(block).items()}
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
