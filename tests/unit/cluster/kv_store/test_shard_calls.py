"""All shards together: the smallest answer, and what is known of those that give none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cluster.common.errors import StageError
from cluster.kv_store.shard_calls import ShardCalls, ShardLost
from protos.stage.messages import KvBlock
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Clock, FakeShard

BLOCKS = [KvBlock(bytes([n]), bytes([n - 1]) if n else b"", 32 * n, range(32 * n, 32 * n + 32), (2 * n, 2 * n + 1))
          for n in range(4)]  # fmt: skip
KEYS = [block.key for block in BLOCKS]


def shards(disk: FakeDisk, count: int = 3) -> list[FakeShard]:
    made = [FakeShard(stage, count, lambda sequence, index: 0, Clock()) for stage in range(count)]
    for shard in made:
        shard.disk = disk
    return made


def test_the_smallest_answer_counts() -> None:
    disk = FakeDisk()
    calls = ShardCalls(shards(disk))
    stored = calls.store(BLOCKS)
    assert (stored.blocks, stored.bytes, stored.is_full) == (4, (400, 400, 400), False)
    assert calls.find(KEYS, 5) == 4
    disk.written[KEYS[2]].discard((1, 0))
    assert calls.find(KEYS, 5) == 2
    loaded = calls.load(BLOCKS)
    assert (loaded.blocks, loaded.bytes, loaded.problem) == (2, 1000, "a block is gone")
    assert [entries[0].node for entries in calls.entries().values()] == ["node"] * 3
    disk.used.clear()
    calls.touch([1], KEYS[1:3])
    assert sorted(disk.used) == KEYS[1:3]
    assert calls.drop([0], KEYS) == ""
    assert (disk.written, calls.find(KEYS, 5)) == ({}, 0)
    disk.is_full = True
    assert calls.store(BLOCKS).is_full
    assert calls.close(1)


def test_a_shard_without_an_answer_finds_nothing_and_is_lost_with_pages_in_its_hands() -> None:
    broken = shards(FakeDisk())
    calls = ShardCalls(broken)
    calls.store(BLOCKS)
    broken[1].broken_kv = True
    assert calls.find(KEYS, 5) == 0
    assert sorted(calls.entries()) == [0, 2]
    calls.touch([0, 1], KEYS)
    assert calls.drop([0, 1], KEYS) == "stage 1 shard 0: no answer"
    for call in (calls.load, calls.store):
        with pytest.raises(ShardLost, match="stage 1 shard 0: no answer"):
            call(BLOCKS)
    assert calls.close(1)


@pytest.mark.parametrize(("code", "is_lost"), [("UNKNOWN", False), ("UNIMPLEMENTED", False),
                                               ("UNAVAILABLE", True), ("DEADLINE_EXCEEDED", True)])  # fmt: skip
def test_a_shard_that_says_itself_that_a_call_is_over_holds_no_pages(code: str, is_lost: bool) -> None:
    class Refusal(Exception):
        def code(self) -> SimpleNamespace:
            return SimpleNamespace(name=code)

    def refuse(blocks: object) -> None:
        raise StageError("stage 1 shard 0: refused") from Refusal()

    some = shards(FakeDisk())
    some[1].load_kv = some[1].store_kv = refuse  # type: ignore[assignment, method-assign]
    calls = ShardCalls(some)
    if is_lost:
        with pytest.raises(ShardLost):
            calls.load(BLOCKS)
        assert not calls.close(1), "it may live and still be at work"
        assert not calls.close(1, {0, 2})
        assert calls.close(1, {1}), "its process is replaced"
        return
    assert (calls.load(BLOCKS).blocks, calls.store(BLOCKS).blocks) == (0, 0)
    assert calls.store(BLOCKS).problem == "stage 1 shard 0: refused"


def test_closing_says_whether_a_shard_is_still_at_work() -> None:
    (shard,) = shards(FakeDisk(), 1)
    shard.kv_gate = threading.Event()
    calls = ShardCalls([shard])
    thread = threading.Thread(target=lambda: calls.store(BLOCKS))
    thread.start()
    while not shard.kv_calls:
        pass
    assert not calls.close(0.05)
    assert calls.find(KEYS, 5) == 0, "no call begins any more"
    shard.kv_gate.set()
    thread.join(5)
    assert calls.close(1)


def test_a_look_up_waits_for_so_long() -> None:
    some = shards(FakeDisk())
    answer = threading.Event()
    some[1].find_kv = lambda keys: answer.wait(20) * 3  # type: ignore[method-assign]
    calls = ShardCalls(some)
    with pytest.raises(TimeoutError, match=r"a shard has not answered within 0\.05 s"):
        calls.find(KEYS, 0.05)
    answer.set()
    assert calls.find(KEYS, 5) == 0
    assert calls.close(5)


def test_a_call_that_is_about_to_begin_is_under_way() -> None:
    some = shards(FakeDisk())
    calls, threads = ShardCalls(some), []
    submit = calls._threads.submit

    def late(function: Callable[..., object], shard: FakeShard) -> Future[object]:
        def begin() -> object:
            threads.append(threading.current_thread())
            ready.wait(20)  # the thread has the call and has not begun it
            return function(shard)

        return submit(begin)

    ready = threading.Event()
    calls._threads.submit = late  # type: ignore[method-assign, assignment]
    caller = threading.Thread(target=lambda: calls.load(BLOCKS))
    caller.start()
    while len(threads) < 3:
        pass
    assert not calls.close(0.05)
    ready.set()
    caller.join(5)
    assert calls.close(1)


def test_nobody_waits_for_a_call_that_closing_has_cancelled() -> None:
    some = shards(FakeDisk())
    some[0].kv_gate = threading.Event()
    calls, lost = ShardCalls(some), []
    calls._threads = ThreadPoolExecutor(1)  # the other shards wait for the first one

    def load() -> None:
        try:
            calls.load(BLOCKS)
        except ShardLost as error:
            lost.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    while not some[0].kv_calls:
        pass
    assert not calls.close(0.05)
    some[0].kv_gate.set()
    thread.join(5)
    assert lost in (["cancelled"], ["stage 0 shard 0: the pipeline is being closed"])  # by when the others were begun
    assert calls.close(1)
