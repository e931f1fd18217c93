"""Stored KV through an engine: found, loaded, written beside the steps, and never in the way of a request."""

from __future__ import annotations

import logging
import threading

import pytest

from cluster.common.errors import EngineError
from cluster.engine.outputs import PrefillProgress
from cluster.engine.request_handle import RequestHandle
from cluster.kv_store import store as store_module
from cluster.scheduler.request import FinishReason
from protos.stage.messages import StepPlan
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import WAIT, Rig, eventually
from tests.support.oracles.integrity import check_engine

DOCUMENT = list(range(1000, 1320))  # ten blocks of 32 tokens, 20 pages


def computed(rig: Rig) -> int:
    """Prompt tokens that the first stage has computed."""
    return sum(part.length for plan in rig.shards[0].plans for part in plan.slices if part.start < part.prompt_len)


def stored(rig: Rig) -> int:
    return rig.store.stats.stored_blocks


def disk_with_document(**cluster: int) -> FakeDisk:
    """Return a disk on which a cluster has stored DOCUMENT."""
    disk = FakeDisk()
    with Rig(disk=disk, **cluster) as rig:
        rig.run([*DOCUMENT, 1])
        eventually(lambda: stored(rig) == 10)
    return disk


def begin_load(rig: Rig, shard: int) -> RequestHandle:
    """Return a request about DOCUMENT whose load waits for the gate of a shard."""
    rig.shards[shard].kv_gate = threading.Event()
    handle, _ = rig.submit([*DOCUMENT, 2])
    eventually(lambda: "load" in rig.shards[shard].kv_calls)
    return handle


def test_what_one_cluster_stores_the_next_one_loads() -> None:
    disk = FakeDisk()
    with Rig(disk=disk) as rig:
        first, _ = rig.run([*DOCUMENT, 1])
        assert first.cached_tokens == 0
        eventually(lambda: stored(rig) == 10)
        check_engine(rig.engine)
    with Rig(disk=disk, stages=1) as rig:
        again, events = rig.run([*DOCUMENT, 2])
        assert (again.cached_tokens, again.token_ids, computed(rig)) == (320, first.token_ids, 1)
        progress = [event for event in events if isinstance(event, PrefillProgress)]
        assert (progress[0].cached, progress[1].cached, progress[1].processed) == (0, 320, 320)
        assert rig.store.stats.loaded_blocks == rig.store.stats.found_blocks == 10
    assert sorted(disk.blocks) == sorted(disk.written), "nothing was stored twice or dropped"


def test_a_cluster_of_more_shards_finds_what_all_of_them_can_load() -> None:
    disk = disk_with_document(stages=1)
    key = next(key for key, block in disk.blocks.items() if block.start == 96)
    disk.written[key].discard((0, 0))
    with Rig(disk=disk, stages=1) as rig:
        again, _ = rig.run([*DOCUMENT, 2])
        assert again.cached_tokens == 96
        eventually(lambda: (0, 0) in disk.written[key])  # stored again, so that the next one finds it


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_does_not_answer_a_look_up_has_nothing(shard: int) -> None:
    disk = disk_with_document()
    with Rig(disk=disk) as rig:
        rig.shards[shard].broken_kv = True
        again, _ = rig.run([*DOCUMENT, 2])
        assert (again.cached_tokens, again.error) == (0, "")


def test_blocks_that_vanish_between_look_up_and_load_are_computed() -> None:
    disk = disk_with_document()
    with Rig(disk=disk) as rig:
        handle = begin_load(rig, 0)
        disk.forget(next(key for key, block in disk.blocks.items() if block.start == 160))
        rig.shards[0].kv_gate.set()
        assert handle.wait(WAIT).cached_tokens == 160
        check_engine(rig.engine)


def test_a_shard_that_is_lost_in_a_load_fails_the_pipeline() -> None:
    disk = disk_with_document()
    with Rig(disk=disk) as rig:
        handle = begin_load(rig, 1)
        rig.shards[1].broken_kv = True
        rig.shards[1].kv_gate.set()
        with pytest.raises(EngineError, match=r"stored KV could not be read: stage 1 shard 0: no answer"):
            handle.wait(WAIT)


def test_others_run_while_stored_kv_is_loaded() -> None:
    disk = disk_with_document()
    with Rig(disk=disk) as rig:
        handle = begin_load(rig, 0)
        other, _ = rig.submit([5] * 100, 5)
        assert len(other.wait(WAIT).token_ids) == 5
        assert not handle.done.is_set()
        rig.shards[0].kv_gate.set()
        assert handle.wait(WAIT).cached_tokens == 320


def test_a_slow_disk_means_fewer_blocks_and_no_slower_step() -> None:
    disk = FakeDisk()
    with Rig(disk=disk, pages=40) as rig:
        rig.shards[0].kv_gate = threading.Event()
        for base in (1000, 2000, 3000):  # one fits at a time
            rig.run([*range(base, base + 320), 1])
        assert stored(rig) == 0
        rig.shards[0].kv_gate.set()
        eventually(lambda: len(rig.store.backlog) == 0)
        eventually(lambda: stored(rig) + rig.store.stats.not_stored_blocks == 30)
        assert 0 < stored(rig) < 30
        assert any(block.token_ids[0] == 3000 for block in disk.blocks.values()), "those that are in memory"
        check_engine(rig.engine)


def test_a_full_disk_pauses_storing_and_warns_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PAUSE_S", 0.02)
    disk = FakeDisk(is_full=True)
    with Rig(disk=disk) as rig, caplog.at_level(logging.WARNING):
        for base in (1000, 2000):
            result, _ = rig.run([*range(base, base + 320), 1])
            assert result.finish_reason is FinishReason.LENGTH
        eventually(lambda: rig.store.stats.not_stored_blocks == 20)
        assert rig.shards[0].kv_calls.count("store") <= 2 * 5, "tried again for new blocks only"
        assert rig.store.is_full
        assert [line for line in caplog.messages if "the disk is full" in line] == [caplog.messages[0]]
        disk.is_full = False
        rig.run([*range(3000, 3320), 1])
        eventually(lambda: stored(rig) == 10)
        assert not rig.store.is_full
        assert rig.store.stats.not_stored_blocks == 20


def test_a_document_larger_than_what_is_left_comes_from_the_store_each_turn() -> None:
    with Rig(disk=FakeDisk(), pages=24, stages=1) as rig:
        for turn in range(3):
            for base in (1000, 5000):
                result, _ = rig.run([*range(base, base + 320), turn])
                assert result.cached_tokens == (320 if turn else 0)
                eventually(lambda: stored(rig) + rig.store.stats.not_stored_blocks >= 10)
                eventually(lambda: not rig.store.backlog.busy and not len(rig.store.backlog))
        assert computed(rig) == 2 * 321 + 4, "each document was computed once"


@pytest.mark.parametrize("same_cluster", [True, False])
def test_a_retry_after_a_cancel_at_60_percent_computes_at_most_45(same_cluster: bool) -> None:
    disk, prompt = FakeDisk(), list(range(640))
    with Rig(disk=disk, budget=32, stages=2) as rig:
        for shard in rig.shards:
            shard.hold()
        handle, _ = rig.submit(prompt, 2)
        for shard in rig.shards:
            shard.let(12)  # chunks of 32 tokens: 60 %
        eventually(lambda: handle.request.num_computed == 384)
        rig.engine.cancel(handle)
        assert handle.wait(WAIT).finish_reason is FinishReason.CANCELLED
        for shard in rig.shards:
            shard.let(1000)
        before = computed(rig)
        if same_cluster:
            result, _ = rig.run(prompt, 2)
            assert len(result.token_ids) == 2
            assert computed(rig) - before <= 0.45 * 640
            return
        eventually(lambda: stored(rig) == 12)
    with Rig(disk=disk, budget=32, stages=2) as rig:
        result, _ = rig.run(prompt, 2)
        assert len(result.token_ids) == 2
        assert computed(rig) <= 0.45 * 640


@pytest.mark.parametrize("at", ["find", "load"])
def test_a_cancel_while_kv_is_looked_up_or_loaded_leaves_no_page(at: str) -> None:
    disk = disk_with_document()
    with Rig(disk=disk) as rig:
        gate = rig.shards[0].kv_gate = threading.Event()
        handle, _ = rig.submit([*DOCUMENT, 2])
        eventually(lambda: at in rig.shards[0].kv_calls)
        rig.engine.cancel(handle)
        assert handle.wait(WAIT).finish_reason is FinishReason.CANCELLED
        gate.set()
        eventually(lambda: rig.pool.usage == 0)
        check_engine(rig.engine)


def test_a_document_that_is_added_while_the_living_ones_are_read_is_stored() -> None:
    with Rig(disk=FakeDisk(), pages=100) as rig:
        gone, _ = rig.submit([*DOCUMENT[:64], 1], document_id="gone")
        gone.wait(WAIT)
        eventually(lambda: stored(rig) == 2)
        added: list[RequestHandle] = []

        def read_living() -> set[str]:
            added.append(rig.submit([*range(5000, 5320), 1], document_id="new")[0])
            return set()

        rig.engine.keep_documents(read_living)
        added[0].wait(WAIT)
        assert rig.run([*range(5000, 5320), 2], document_id="new")[0].cached_tokens == 320
        eventually(lambda: stored(rig) == 12)
        assert rig.pool.match(gone.request.hashes) == ()


def test_a_failed_pipeline_stores_nothing_more_and_ends_at_once() -> None:
    deadly: list[StepPlan] = []
    with Rig(disk=FakeDisk(), budget=32) as rig:
        rig.shards[1].deadly = lambda plan: deadly.append(plan) is None and len(deadly) > 3
        handle, _ = rig.submit(DOCUMENT)
        with pytest.raises(EngineError, match="stage 1 shard 0 is gone"):
            handle.wait(WAIT)


def test_pages_that_a_new_shard_cannot_load_are_found_by_nobody() -> None:
    disk = FakeDisk()
    with Rig(disk=disk) as rig:
        rig.run([*DOCUMENT, 1])
        eventually(lambda: stored(rig) == 10)
        eventually(lambda: len(rig.pool.stored_blocks()) == 10)
    disk.forget(next(key for key, block in disk.blocks.items() if block.start == 160))
    rig.pool.release_all()
    new = Rig(disk=disk).shards[1]
    assert rig.store.refill(rig.pool, [new]) == 18
    assert sorted(block.start for block in new.loaded) == [0, 32, 64, 96, 128, 192, 224, 256, 288]
    assert len(rig.pool.published()) == 18
    assert rig.pool.usage == 0


def test_heads_that_share_a_folder_find_what_the_other_one_stores_meanwhile() -> None:
    disk = FakeDisk()
    with Rig(disk=disk) as one, Rig(disk=disk) as other:
        eventually(lambda: one.store.max_bytes and other.store.max_bytes)  # both have listed it
        one.run([*DOCUMENT, 1])
        eventually(lambda: stored(one) == 10)
        result, _ = other.run([*DOCUMENT, 2])
        assert result.cached_tokens == 320
        disk.written.clear()  # the other one drops everything
        other.run([*range(5000, 6000), 1])  # so does the memory of this one
        result, _ = one.run([*DOCUMENT, 3])
        assert (result.cached_tokens, result.error) == (320, ""), "in memory still"


def test_a_resumed_request_computes_its_answer_again_after_a_stored_prompt() -> None:
    disk = FakeDisk()
    with Rig(disk=disk, stages=1) as rig:
        first, _ = rig.run([*DOCUMENT, 1], 6)
        eventually(lambda: stored(rig) == 10)
    with Rig(disk=disk, stages=1) as rig:
        again, _ = rig.run([*DOCUMENT, 1], 6, resume=first.samples[:4])
        assert (again.token_ids, again.cached_tokens) == (first.token_ids, 320)
        prefill, *decode = [part for plan in rig.shards[0].plans for part in plan.slices]
        assert (prefill.start, prefill.length) == (320, 5), "the last token of the prompt and four of the answer"
        assert len(decode) == 1


def test_blocks_that_begin_alike_are_loaded_into_their_common_page() -> None:
    disk = FakeDisk()
    with Rig(disk=disk) as rig:
        for tail in (1, 2):  # the second block begins with the same page
            rig.run([*DOCUMENT[:48], *[tail] * 30], 1)
        eventually(lambda: stored(rig) == 3)
        eventually(lambda: len(rig.pool.stored_blocks()) == 3)
    rig.pool.release_all()
    new = Rig(disk=disk).shards[1]
    assert rig.store.refill(rig.pool, [new]) == 5
    assert [block.start for block in new.loaded] == [0, 32, 32]
