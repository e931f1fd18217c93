"""Several decode steps in flight at one stage or more, and results that come in groups."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.common.errors import EngineError
from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
from cluster.jobs.model import JobState
from cluster.scheduler.request import FinishReason
from cluster.text.tokenizer import TextTokenizer
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import NEEDLE, WAIT, Rig, eventually
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.service import Bench

TEXT = "the river ran by the old mill and the old mill stood by the river"


def burst_rig(step_s: float = 0.02, group: int = 4, stages: int = 1, **options) -> Rig:
    """An engine whose steps take `step_s` through all stages together."""
    rig = Rig(stages=stages, **options)
    for shard in rig.shards:
        shard.step_s, shard.group = step_s / stages, group
    return rig


@pytest.mark.parametrize(
    ("step_s", "depth"), [(0.5, 2), (0.126, 2), (0.124, 2), (0.083, 3), (0.06, 4), (0.049, 5), (0.04, 6), (0.001, 6)]
)
def test_as_many_steps_are_in_flight_as_a_quarter_of_a_second_holds(step_s: float, depth: int):
    with burst_rig(step_s, group=1) as rig:
        rig.last.hold()
        handle, _ = rig.submit([1, 2, 3], 60)
        eventually(lambda: len(rig.last.plans) == 1)
        time.sleep(0.02)
        assert len(rig.last.plans) == 1, "nobody knows yet how long a step takes"
        done = 0
        for _ in range(12):
            rig.last.let(1)
            done += 1
            eventually(lambda done=done: len(rig.last.plans) >= done + (2 if done == 1 else depth))
        time.sleep(0.02)
        assert len(rig.last.plans) == done + depth
        rig.last.let(1000)
        assert handle.wait(WAIT).token_ids == tuple(range(1000, 1060))
        assert len(rig.last.plans) == 60, "no step for nothing"


@pytest.mark.parametrize(("step_s", "depth"), [(0.06, 4), (0.03, 8), (0.001, 12)])
def test_long_answers_have_longer_bursts(step_s: float, depth: int):
    with burst_rig(step_s, group=1) as rig:
        rig.last.hold()
        handle, _ = rig.submit([1, 2, 3], 60)
        for done in range(40):
            rig.last.let(1)
            ahead = min(depth, max(6, (done - 1) // 2))
            eventually(lambda done=done, ahead=ahead: len(rig.last.plans) >= done + (ahead if done > 1 else 1))
        eventually(lambda: len(rig.last.plans) >= 40 + depth)
        time.sleep(0.02)
        assert len(rig.last.plans) == 40 + depth
        rig.last.let(1000)
        assert handle.wait(WAIT).token_ids == tuple(range(1000, 1060))
        assert len(rig.last.plans) == 60


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 13])
def test_groups_of_any_size_give_the_same_events(group: int, max_tokens: int):
    with burst_rig(group=group) as rig:
        result, events = rig.run([1, 2, 3], max_tokens)
    tokens = [event.token_id for event in events if isinstance(event, OutputToken)]
    assert tokens == list(result.token_ids) == list(range(1000, 1000 + max_tokens))
    assert [type(event) for event in events[:2]] == [PrefillProgress] * 2
    assert [type(event) for event in events[-2:]] == [OutputToken, Generation]
    assert sum(isinstance(event, PrefillProgress) for event in events) == 2
    assert len(rig.last.plans) == max_tokens


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_plans_of_a_burst_travel_together(stages: int):
    with burst_rig(stages=stages) as rig:
        rig.run([1, 2, 3], 80)
    assert sum(rig.last.bursts) == 80
    assert max(rig.last.bursts) >= 3
    assert len(rig.last.bursts) < 60


@pytest.mark.parametrize("at", range(2, 12))
@pytest.mark.parametrize(("group", "stages"), [(1, 1), (4, 1), (4, 2)])
def test_an_end_inside_a_burst(at: int, group: int, stages: int):
    with burst_rig(group=group, stages=stages, eos=(1000 + at,)) as rig:
        result, events = rig.run([1], 40)
        again, _ = rig.run([2], 3)
        assert (result.finish_reason, len(result.token_ids)) == (FinishReason.STOP, at + 1)
        assert sum(isinstance(event, OutputToken) for event in events) == at + 1
        assert len(rig.last.plans) <= at + 1 + 6 + 3
    assert again.token_ids == (1000, 1001, 1002)


@pytest.mark.parametrize(
    ("stop", "text"), [("ran", "the river "), ("old", "the river ran by the "), ("n by t", "the river ra")]
)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_stop_string_inside_a_burst(stop: str, text: str, group: int):
    ids = TextTokenizer.open(NEEDLE).encode(TEXT)
    with burst_rig(group=group, text=True) as plain:
        plain.last.script = lambda _, index: ids[index]
        result, events = plain.run([1], len(ids), stop=(stop,))
        again, _ = plain.run([1], 3)
    tokens = [event for event in events if isinstance(event, OutputToken)]
    assert (result.text, result.finish_reason) == (text, FinishReason.STOP)
    assert "".join(event.text for event in tokens) == text
    assert [event.token_id for event in tokens] == list(result.token_ids) == ids[: len(tokens)]
    assert list(again.token_ids) == ids[:3]


def decoding(rig: Rig, max_tokens: int = 60) -> tuple:
    """A request with a whole burst in flight: five steps of it are done."""
    rig.last.hold()
    rig.last.let(5)
    handle, events = rig.submit([1, 2, 3], max_tokens)
    eventually(lambda: len(rig.last.plans) == 10)
    return handle, events


def test_cancel_inside_a_burst():
    with burst_rig(0.049, group=1) as rig:
        handle, events = decoding(rig)
        rig.engine.cancel(handle)
        assert handle.wait(WAIT).token_ids == tuple(range(1000, 1005))
        rig.last.let(1000)
        again, _ = rig.run([4], 3)
        assert sum(isinstance(event, Generation) for event in events) == 1
        assert len(rig.last.plans) == 10 + 3, "nothing but the burst is computed for it"
    assert again.token_ids == (1000, 1001, 1002)


def test_a_new_request_waits_for_no_more_than_the_burst():
    with burst_rig(0.049, group=1) as rig:
        first, _ = decoding(rig)
        second, _ = rig.submit(range(50, 80), 4)
        check_engine(rig.engine)
        assert len(rig.last.plans) == 10, "nothing is queued before the burst is almost over"
        rig.last.let(3)
        time.sleep(0.02)
        assert len(rig.last.plans) == 10
        rig.last.let(1)
        eventually(lambda: len(rig.last.plans) == 11)
        assert [part.length for part in rig.last.plans[10].slices] == [1, 30]
        time.sleep(0.02)
        assert len(rig.last.plans) == 11, "no burst behind a prompt"
        rig.last.let(1000)
        assert first.wait(WAIT).token_ids == tuple(range(1000, 1060))
        assert second.wait(WAIT).token_ids == tuple(range(1000, 1004))
        check_engine(rig.engine)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("group", [1, 3, 4, 5])
def test_an_error_inside_a_group_ends_after_the_tokens_before_it(group: int, stages: int):
    with burst_rig(group=group, stages=stages) as rig:
        rig.last.fail_at = 8
        handle, events = rig.submit([1], 40)
        with pytest.raises(EngineError, match="broken"):
            handle.wait(WAIT)
        tokens = [event.token_id for event in events if isinstance(event, OutputToken)]
        assert tokens == list(range(1000, 1007))
        assert isinstance(events[-1], Generation)
        assert sum(isinstance(event, Generation) for event in events) == 1


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_many_requests_of_different_lengths(stages: int):
    with burst_rig(pages=400, group=3, stages=stages) as rig:
        specs = [(generation_spec([i] * (1 + 5 * i), 1 + 3 * i), lambda event: None) for i in range(12)]
        handles = rig.engine.submit_all(specs)
        for handle, (spec, _) in zip(handles, specs, strict=True):
            assert handle.wait(WAIT).token_ids == tuple(range(1000, 1000 + spec.options.max_tokens))
        check_engine(rig.engine)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("steps", [5, 6, 7, 9])
def test_a_job_goes_on_where_a_burst_broke_off(bench: Bench, steps: int):
    shard = bench.runtime.shard
    shard.step_s, shard.group = 0.01, 4
    shard.hold()
    shard.let(steps)
    job_id = bench.submit(max_tokens=30)
    eventually(lambda: len(shard.plans) > 5)
    bench.runtime.fail()
    assert bench.service.wait(job_id, WAIT).state is JobState.SUCCEEDED
    assert bench.ids(job_id) == list(range(100, 130))
    assert bench.service.get(job_id).restarts == 1
    assert bench.runtime.shard is not shard
    bench.check_idle()
