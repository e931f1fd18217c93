"""A shard whose neighbours were replaced: what it forgets, what it keeps, and when it refuses to go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from protos.stage import stage_pb2 as pb
from protos.stage.messages import SequenceSlice, StepPlan, StepResult
from tests.unit.workers.stage.test_worker import PAGE, SPEC, decode, loaded, prefill
from workers.stage.worker import StageWorker
from workers.transport.collectives import GroupLost
from workers.transport.link import LinkClosed


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StageWorker]:
    made = loaded(tmp_path, replace(SPEC, sparse=None))
    made.start(pb.StartRequest(num_pages=20, page_size=PAGE, epoch=1))
    yield made
    made.close()


def run(worker: StageWorker, epoch: int, *plans: StepPlan) -> list[StepResult]:
    return [result for group in worker.run([list(plans)], epoch) for result in group]


def relink(worker: StageWorker, epoch: int) -> None:
    worker.unlink(epoch)
    worker.relink(pb.StartRequest(epoch=epoch))


def continued(start: int, length: int) -> StepPlan:
    """The end of the prompt of `prefill`, under another sequence that has its first pages."""
    (whole,) = prefill(length).slices
    ids = whole.token_ids[start:]
    return StepPlan(
        1, (SequenceSlice(7, start, len(ids), length, ids, whole.new_pages, whole.num_pages, whole.sample),)
    )


def test_pages_stay_and_sequences_are_forgotten(worker: StageWorker) -> None:
    first = run(worker, 1, prefill(70), decode(1, prompt=70))
    assert not any(result.error for result in first)
    relink(worker, 2)
    assert worker.epoch == 2
    (again,) = run(worker, 2, continued(64, 70))
    assert again.samples[0].token_id == first[0].samples[0].token_id
    assert again.samples[0].logprob == pytest.approx(first[0].samples[0].logprob, abs=1e-4)
    relink(worker, 3)
    (unknown,) = run(worker, 3, decode(1, prompt=70))
    assert "the plan counts 5 pages, this shard 0" in unknown.error


def test_a_run_of_another_epoch_gives_nothing(worker: StageWorker) -> None:
    relink(worker, 2)
    assert run(worker, 1, prefill(20)) == []
    assert (worker.num_late, worker.error) == (1, "")
    assert len(run(worker, 2, prefill(20))) == 1


def test_a_run_ends_when_another_epoch_begins(worker: StageWorker) -> None:
    groups = worker.run([[prefill(20)], [decode(1)], [decode(2)]], 1)
    assert len(next(groups)) == 1
    worker.unlink(2)
    assert list(groups) == []


@pytest.mark.parametrize("error", [LinkClosed("the previous stage is gone"), GroupLost("shard 1 has left")])
def test_whoever_lost_a_neighbour_goes_on(
    worker: StageWorker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: StepPlan) -> None:
        raise error

    run(worker, 1, prefill(20))
    assert worker._stepper is not None
    monkeypatch.setattr(worker._stepper, "step", fail)
    (failed,) = run(worker, 1, prefill(20))
    assert failed.error == f"stage 0 shard 0, step 1: {error}" == worker.error
    assert not worker.is_broken
    relink(worker, 2)
    assert worker.error == ""
    assert not run(worker, 2, prefill(20))[0].error


def test_whoever_failed_by_itself_does_not(worker: StageWorker) -> None:
    (failed,) = run(worker, 1, decode(3))
    assert failed.error
    assert worker.is_broken
    with pytest.raises(RuntimeError, match="stage 0 shard 0, step 4: sequence 1: the plan counts"):
        relink(worker, 2)


def test_a_device_that_waits_for_another_shard_goes_on(worker: StageWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """When stages are replaced, before the thread that computes is asked for anything."""
    reasons: list[str] = []
    monkeypatch.setattr(worker._collectives, "abort", reasons.append)
    worker.unlink(2)
    assert reasons == ["stages are being replaced"]
