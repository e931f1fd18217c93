"""Jobs over a pipeline that is repaired: who is blamed for failures, and what clients see of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engine import supervisor as supervisor_module
from cluster.engine.pipeline import Pipeline
from cluster.jobs.blame import MAX_FAILURES
from cluster.jobs.model import JobState
from protos.stage.messages import StepPlan
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

POISON = 3
_LAUNCH = FakeRuntime._launch


def _repairable(runtime: FakeRuntime) -> Pipeline:
    """A pipeline whose repair is another one, over another shard."""
    return replace(_LAUNCH(runtime), repair=lambda: _repairable(runtime))


def poisoned(plan: StepPlan) -> bool:
    return any(POISON in part.token_ids for part in plan.slices)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0,) * 5)
    monkeypatch.setattr(FakeRuntime, "_launch", _repairable)
    made = Bench(tmp_path, seqs=3)
    yield made
    made.close()


def test_the_job_that_kills_shards_is_given_up_alone(bench: Bench) -> None:
    bench.runtime.deadly = poisoned
    good = [bench.submit(tokens, max_tokens=9) for tokens in (5, 70)]
    poison = bench.submit(40, first=POISON)
    good.append(bench.submit(130, max_tokens=9))
    record = bench.service.wait(poison, 60)
    assert (record.state, "given up" in record.error) == (JobState.FAILED, True)
    assert [bench.service.wait(job_id, 60).state for job_id in good] == [JobState.SUCCEEDED] * 3
    assert all(bench.ids(job_id) == list(range(100, 109)) for job_id in good)
    bench.check_idle()
    supervisor = bench.runtime.supervisor
    assert supervisor.num_repaired >= 1
    assert supervisor.num_repaired + supervisor.num_restarted == bench.runtime.starts - 1 >= 5


def test_repairs_between_which_a_job_comes_further_are_counted_against_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=3000)
    for starts in range(2, 2 + 2 * MAX_FAILURES):
        before = len(bench.ids(job_id))
        bench.runtime.shard.let(4)
        eventually(lambda before=before: len(bench.ids(job_id)) > before)  # type: ignore[misc]
        bench.runtime.fail()
        eventually(lambda starts=starts: bench.runtime.starts == starts)  # type: ignore[misc]
        eventually(lambda: not bench.service._recovering)
    assert bench.service.get(job_id).restarts >= 2 * MAX_FAILURES
    supervisor = bench.runtime.supervisor
    assert (supervisor.num_repaired, supervisor.num_restarted) == (2 * MAX_FAILURES, 0)
    assert bench.service.cancel(job_id).state is JobState.CANCELLED
    bench.runtime.shard.let(10_000)
    bench.check_idle()
