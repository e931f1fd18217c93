"""Large loads say how long they take; see test_stored_kv for what is read."""

from __future__ import annotations

import logging

import pytest

from cluster.config.schema import KvStoreSection
from cluster.kv_store import reader as module
from cluster.kv_store.reader import KvReader
from cluster.kv_store.shard_calls import ShardCalls, ShardLost
from cluster.kv_store.store import KvStore
from protos.stage.messages import KvBlock
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Clock, FakeShard

SIZE = 10 << 20
BLOCKS = [KvBlock(bytes([n]), bytes([n - 1]) if n else b"", 32 * n, range(32), (n,)) for n in range(10)]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> KvReader:
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "BATCH_BYTES", 0)
    clock, disk = Clock(), FakeDisk(block_bytes=SIZE)
    shard = FakeShard(0, 1, lambda sequence, index: 0, clock)
    shard.disk = disk
    shard.store_kv(BLOCKS)
    load = shard.load_kv

    def slow(blocks: list[KvBlock]) -> object:
        clock.now += 2.0
        return load(blocks)

    shard.load_kv = slow  # type: ignore[method-assign]
    store = KvStore(KvStoreSection())
    for block in BLOCKS:
        store.index.add(block.key, block.parent, block.start, {"n": SIZE}, 1.0)
    return KvReader(store, ShardCalls([shard]), lambda action: action(), clock)


def test_a_large_load_is_told_as_soon_as_the_speed_is_known(
    reader: KvReader, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    done: list[int] = []
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            reader._load(BLOCKS, lambda: True, done.append, pytest.fail)
        reader._load(BLOCKS[:5], lambda: True, done.append, pytest.fail)
    assert done == [10, 10, 5]
    assert caplog.messages == [
        "reading stored KV of 320 tokens: 100MiB at 20MiB/s, about 5.0 s",
        "reading stored KV of 320 tokens: 100MiB at 16.67MiB/s, about 6.0 s",
    ]


def test_a_load_that_nobody_wants_any_more_ends_with_the_call_under_way(
    reader: KvReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    answers = iter((True, False))
    reader._load(BLOCKS, lambda: next(answers), done.append, pytest.fail)
    assert done == [4]
    monkeypatch.setattr(module, "BATCH_BYTES", 7 * SIZE)
    answers = iter((True, False))
    reader._load(BLOCKS, lambda: next(answers), done.append, pytest.fail)
    assert done == [4, 7], "small blocks are read by more than that"


def test_after_a_look_up_without_an_answer_prompts_are_computed_at_once(
    reader: KvReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[int] = []
    asked: list[float] = []

    def silent(keys: object, within_s: float) -> int:
        asked.append(within_s)
        raise TimeoutError("a shard has not answered within 10.0 s")

    keys = [block.key for block in BLOCKS]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(reader._calls, "find", silent)
        for _ in range(3):
            reader._find(keys, found.append)
    assert (found, asked) == ([0, 0, 0], [module.FIND_WITHIN_S])
    assert caplog.messages == ["stored KV is not looked up for 60 s: a shard has not answered within 10.0 s"]
    reader._clock.now += module.MUTE_S  # type: ignore[attr-defined]
    reader._find(keys, found.append)
    assert found[-1] == 10


@pytest.mark.parametrize("is_late", [True, False])
def test_a_disk_that_costs_a_pipeline_is_not_asked_by_the_next_one(reader: KvReader, is_late: bool) -> None:
    def lose(blocks: object) -> None:
        raise ShardLost("stage 0 shard 0: no answer", is_late)

    lost: list[str] = []
    reader._calls.load = lose  # type: ignore[method-assign]
    reader._load(BLOCKS, lambda: True, pytest.fail, lost.append)
    assert lost == ["stored KV could not be read: stage 0 shard 0: no answer"]
    found: list[int] = []
    successor = KvReader(reader._store, reader._calls, lambda action: action(), reader._clock)
    successor._find([block.key for block in BLOCKS], found.append)
    assert found == [0 if is_late else 10], "a killed shard says nothing about the disk"
