"""What becomes of a block that cannot be written: tried again, then given up until a later prompt offers it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from cluster.common.errors import StageError
from cluster.kv_store import writer as module
from protos.stage import stage_pb2 as pb
from protos.stage.messages import KvBlock
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Rig, eventually
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.kv_store import read, ready, start


class Busy(Exception):
    """As of gRPC, of a shard that answers too many calls."""

    def code(self) -> SimpleNamespace:
        return SimpleNamespace(name="RESOURCE_EXHAUSTED")


def io_error(blocks: Sequence[KvBlock]) -> pb.KvStored:
    return pb.KvStored(blocks=len(blocks) // 2, problem="[Errno 5] Input/output error")


def busy(blocks: Sequence[KvBlock]) -> pb.KvStored:
    error = StageError("stage 1 shard 0: 16 calls about the KV store run; try again")
    error.__cause__ = Busy()
    raise error


def fail(rig: Rig, times: int, how: Callable[[Sequence[KvBlock]], pb.KvStored], after: int = 0) -> list[int]:
    """Let calls of the second shard fail, after some; returns the starts of the first block of each call."""
    shard, store, starts = rig.shards[1], rig.shards[1].store_kv, list[int]()

    def answer(blocks: Sequence[KvBlock]) -> pb.KvStored:
        starts.append(blocks[0].start)
        if not after < len(starts) <= after + times:
            return store(blocks)
        reply = how(blocks)
        if reply.blocks:
            store(blocks[: reply.blocks])
        return reply

    shard.store_kv = answer  # type: ignore[method-assign]
    return starts


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", (0.001, 0.002))


@pytest.mark.parametrize("how", [io_error, busy])
@pytest.mark.parametrize("times", [1, 2])
def test_a_hiccup_costs_no_block(how: Callable[[Sequence[KvBlock]], pb.KvStored], times: int) -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        starts = fail(rig, times, how, after=1)
        read(rig, 1000, "one")
        assert all(shards == {(0, 0), (1, 0)} for shards in disk.written.values())
        assert (len(disk.written), rig.store.stats.stored_blocks, rig.store.stats.not_stored_blocks) == (10, 10, 0)
        assert len(starts) >= 3 + times
        assert rig.store.events.account["one"] == sorted(disk.written, key=lambda key: disk.blocks[key].start)
        check_engine(rig.engine)


def test_what_fails_for_good_is_given_up_until_a_later_prompt_offers_it(caplog: pytest.LogCaptureFixture) -> None:
    disk = FakeDisk()
    with start(disk) as rig, caplog.at_level(logging.WARNING):
        ready(rig)
        starts = fail(rig, 1000, io_error)
        read(rig, 1000)
        kept = rig.store.stats.stored_blocks
        assert rig.store.stats.not_stored_blocks == 10 - kept
        calls = len(starts)
        assert [line for line in caplog.messages if "not written" in line] == [
            "stored KV: a block was not written: [Errno 5] Input/output error"
        ]
        read(rig, 2000)
        assert len(starts) == calls + 1, "no pause for every prompt while nothing can be written"
        del rig.shards[1].store_kv  # type: ignore[method-assign]
        before = rig.store.stats.not_stored_blocks
        read(rig, 1000)
        assert rig.store.stats.not_stored_blocks == before
        assert sum(block.token_ids[0] < 2000 for block in map(disk.blocks.get, rig.store.index._entries)) == 10
        starts = fail(rig, 2, io_error)
        read(rig, 3000)
        assert len(starts) >= 5, "after a success it is tried again"
        assert rig.store.stats.not_stored_blocks == before
        check_engine(rig.engine)


def test_an_account_that_is_busy_for_a_moment_costs_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        note, calls = rig.store.events.before_store, list[str]()

        def before_store(document_id: str, pinned_len: int, keys: Sequence[bytes]) -> bool:
            calls.append(document_id)
            if len(calls) == 2:
                raise RuntimeError("the database is locked")
            return note(document_id, pinned_len, keys)

        monkeypatch.setattr(rig.store.events, "before_store", before_store)
        read(rig, 1000, "one")
        assert (len(disk.written), rig.store.stats.not_stored_blocks) == (10, 0)


def test_pages_that_are_used_again_in_a_pause_are_given_up() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)

        def forget(blocks: Sequence[KvBlock]) -> pb.KvStored:
            rig.engine.post(lambda: rig.pool.unpublish([page for block in blocks for page in block.pages]))
            return pb.KvStored(problem="[Errno 5] Input/output error")

        fail(rig, 1, forget)
        read(rig, 1000)
        assert (rig.store.stats.stored_blocks, rig.store.stats.not_stored_blocks) == (0, 10)
        check_engine(rig.engine)


def test_closing_does_not_wait_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", (600.0,))
    with start(FakeDisk()) as rig:
        ready(rig)
        starts = fail(rig, 1, io_error)
        rig.run([*range(1000, 1320), 1], 1)
        eventually(lambda: starts)
        writer = rig.store._writer
        rig.store.detach(0.0)
        writer.join(10)
        assert not writer._thread.is_alive()
