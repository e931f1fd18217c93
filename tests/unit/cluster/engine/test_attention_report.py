"""Reports of sparse cells: which steps wait for them, how they add up, and where the figures end up."""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.engine.attention_report import AttentionLog, describe_positions, describe_sparsity
from cluster.engine.in_flight import InFlight, Step
from cluster.engine.outputs import Generation, Progress
from cluster.engine.runtime import Ask
from cluster.jobs.model import JobAnswer, JobInput, JobRecord, JobSpec, JobState
from cluster.scheduler.request import FinishReason
from cluster.server.metrics import JobMetrics
from protos.model.grid import split
from protos.model.spec import DualChunkSpec, HeadBudget, RopeSpec, SparseSpec
from protos.stage.messages import (
    CellReport,
    SampledToken,
    SampleSpec,
    SamplingParams,
    SequenceSlice,
    ShardSpec,
    Span,
    StepPlan,
    StepResult,
)
from tests.support.fakes.stage import WAIT, Rig
from tests.support.rigs.scheduler import PLAIN, long_spec

EMPTY = Span(0, 0)
SPARSE = long_spec(100, 64)


def shards(stages: int, ranks: int) -> list[ShardSpec]:
    return [
        ShardSpec(stage, stages, rank, ranks, Span(stage, stage + 1), EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
        for stage in range(stages)
        for rank in range(ranks)
    ]


def step_plan(step: int, sequences: Iterable[int] = (1,)) -> StepPlan:
    parts = [SequenceSlice(s, 0, 1, 1, (0,), (), 1, SampleSpec(SamplingParams(), 0)) for s in sequences]
    return StepPlan(step, tuple(parts))


def report(sequence: int = 1, layer: int = 0, head: int = 0, start: int = 0, length: int = 64, **figures) -> CellReport:
    given = {"density": (0.5,), "estimated_recall": (0.99,), "held_out_recall": (0.9,), "dense": (False,)} | figures
    return CellReport(sequence, layer, head, start, length, **given)


# --- steps under way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations([(0, 0), (0, 1), (1, 0), (1, 1)])))
def test_a_sparse_step_waits_for_every_shard(order: tuple[tuple[int, int], ...]):
    flight = InFlight(shards(2, 2), lambda part: True)
    flight.add(step_plan(1))
    done: list[Step] = []
    for place in order:
        assert not done
        samples = (SampledToken(1, 7),) if place == (1, 0) else ()
        done = flight.take(
            StepResult(1, *place, 1_000_000 + place[0], samples, cells=(report(head=place[1]),), estimate_us=5)
        )
    (step,) = done
    assert (len(step.cells), step.samples, step.slowest_s) == (4, (SampledToken(1, 7),), 1.000001)
    assert (step.compute_us, step.estimate_us, len(flight)) == (4_000_002, 20, 0)


def decode_plan(step: int) -> StepPlan:
    part = SequenceSlice(1, 99 + step, 1, 100, (), (), 10, SampleSpec(SamplingParams(), step))
    return StepPlan(step, (part,))


def test_the_time_of_a_decode_step_through_all_stages():
    flight = InFlight(shards(2, 2), lambda part: False)
    assert flight.decode_s(2) == 0
    prompt = SequenceSlice(1, 0, 100, 100, range(100), (), 10, None)
    flight.add(StepPlan(1, (prompt,)))
    for step in (2, 3, 4):
        flight.add(decode_plan(step))
    flight.take(StepResult(1, 0, 0, 2_000_000))
    flight.take(StepResult(1, 1, 0, 2_000_000))
    assert flight.decode_s(2) == 0, "a prompt tells nothing"
    flight.take(StepResult(2, 1, 0, 30_000))
    assert flight.decode_s(2) == 0.06, "the stage that has not answered takes as long"
    flight.take(StepResult(2, 0, 1, 10_000))  # late, as of everyone whose results no step waits for
    assert flight.decode_s(2) == 0.04
    flight.take(StepResult(2, 0, 0, 20_000))
    assert flight.decode_s(2) == 0.05, "of the shards of a stage the slowest counts"
    flight.take(StepResult(3, 1, 0, 40_000))
    assert flight.decode_s(2) == 0.06
    flight.clear()
    assert flight.decode_s(2) == 0


def test_compute_time_that_is_told_late_counts_for_the_next_step():
    flight = InFlight(shards(2, 1), lambda part: False)
    for step in (1, 2, 3):
        flight.add(decode_plan(step))
    (first,) = flight.take(StepResult(1, 1, 0, 30_000))
    assert first.compute_us == 30_000
    assert flight.take(StepResult(1, 0, 0, 20_000)) == []
    flight.take(StepResult(2, 0, 0, 21_000))
    (second,) = flight.take(StepResult(2, 1, 0, 30_000))
    (third,) = flight.take(StepResult(3, 1, 0, 30_000))
    assert (second.compute_us, third.compute_us) == (71_000, 30_000)


WHEN = {(0, 0): 20_000, (0, 1): 10_000, (1, 1): 15_000, (1, 0): 30_000}  # microseconds of every shard


def test_a_dense_step_waits_for_the_sampling_shard_only():
    flight = InFlight(shards(2, 2), lambda part: False)
    flight.add(step_plan(1))
    assert flight.take(StepResult(1, 0, 1, 10)) == []
    assert [step.plan.step for step in flight.take(StepResult(1, 1, 0, 10))] == [1]
    assert flight.take(StepResult(1, 1, 1, 10)) == [], "late"


def test_steps_are_committed_in_order():
    flight = InFlight(shards(1, 2), lambda part: part.sequence == 1)
    for step, sequence in ((1, 1), (2, 2), (3, 1), (4, 2)):
        flight.add(step_plan(step, [sequence]))
    assert [plan.step for plan in flight.plans] == [1, 2, 3, 4]
    for step in (1, 2, 3):
        assert flight.take(StepResult(step, 0, 0, 1)) == []
    assert [s.plan.step for s in flight.take(StepResult(1, 0, 1, 1))] == [1, 2]
    assert flight.take(StepResult(4, 0, 0, 1)) == []
    assert [s.plan.step for s in flight.take(StepResult(3, 0, 1, 1))] == [3, 4]


# --- sums -------------------------------------------------------------------------------------------------------------


def summed(*reports: CellReport):
    log = AttentionLog()
    log.add(1, Step(step_plan(1), set(), cells=list(reports), compute_us=1000, estimate_us=250))
    return log.summary(SPARSE, 300, 0)


def test_means_are_weighted_by_tokens_and_worst_cells_are_kept():
    found = summed(
        report(start=0, length=64, density=(1.0, 0.5), estimated_recall=(1.0, 0.9), held_out_recall=(1.0, 0.6),
               dense=(True, False)),
        report(start=64, length=32, density=(0.1, 0.2), estimated_recall=(0.7, 0.6), held_out_recall=(0.4, 0.9),
               dense=(False, True)),
        report(layer=2, density=(0.25,), held_out_recall=(1.0,), estimated_recall=(1.0,)),
        report(sequence=2, layer=5),
    )  # fmt: skip
    first, second = found.layers
    assert (first.layer, second.layer, found.cells, found.fallbacks) == (0, 2, 2, 2)
    assert first.density == pytest.approx(((64 + 3.2) / 96, (32 + 6.4) / 96))
    assert first.estimated_recall == pytest.approx(((64 + 22.4) / 96, (57.6 + 19.2) / 96))
    assert (first.estimated_recall_min, first.held_out_recall_min) == ((0.7, 0.6), (0.4, 0.6))
    assert first.fallbacks == (1, 1)
    assert found.density == pytest.approx((67.2 + 38.4 + 16) / 256)
    assert (found.estimated_recall_min, found.held_out_recall_min, found.estimate_share) == (0.6, 0.4, 0.25)
    assert (found.mode, found.scale_len) == ("sparse", 300)


def test_heads_of_different_shards_stand_side_by_side():
    found = summed(
        report(head=2, density=(0.3, 0.4), estimated_recall=(1, 1), held_out_recall=(1, 1), dense=(False, False)),
        report(head=0, density=(0.1, 0.2), estimated_recall=(1, 1), held_out_recall=(1, 1), dense=(False, False)),
    )
    assert found.layers[0].density == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert found.cells == 1


@pytest.mark.parametrize(("prompt", "mode"), [(100, "dense"), (101, "sparse")])
def test_a_prompt_without_reports(prompt: int, mode: str):
    found = AttentionLog().summary(SPARSE, prompt, 7)
    assert found is not None
    assert (found.mode, found.scale_len, found.cells, found.density, found.layers) == (mode, 7, 0, 1.0, ())
    assert AttentionLog().summary(None, prompt, 0) is None


def test_json_is_rounded_and_plain():
    plain = summed(report(density=(1 / 3,))).to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["density"], plain["layers"][0]["density"], plain["cells"]) == (0.3333, [0.3333], 1)


@pytest.mark.parametrize(
    ("spec", "positions", "sparsity"),
    [
        (PLAIN, "default, theta 200000, factor 1", "dense"),
        (replace(PLAIN, rope=RopeSpec(1e7, "yarn", 4.0, 4096), dual_chunk=DualChunkSpec(4096, 512, 4096),
                 sparse=SparseSpec()),
         "yarn, theta 1e+07, factor 4, dual chunk 4096/512 of 4096",
         "vertical-slash above 32768 tokens, cells of 8192, last 64, recall 0.95"),
        (replace(PLAIN, dual_chunk=DualChunkSpec(4096, 512), sparse=SparseSpec(uniform=HeadBudget(10, 20),
                 recall_floor=0.9)), "default, theta 200000, factor 1, dual chunk 4096/512",
         "vertical-slash above 32768 tokens, cells of 8192, last 64, 10 columns and 20 diagonals, floor 0.9 for 0.25"),
        (replace(PLAIN, sparse=SparseSpec(patterns=(), synthetic=True)), "default, theta 200000, factor 1",
         "vertical-slash above 32768 tokens, cells of 8192, last 64, published patterns, synthetic"),
    ],
)  # fmt: skip
def test_descriptions(spec, positions: str, sparsity: str):
    assert (describe_positions(spec), describe_sparsity(spec)) == (positions, sparsity)


# --- through the engine -----------------------------------------------------------------------------------------------


def reporting(layer: int, head: int):
    """What a shard with one layer and one head reports of the cells of a plan."""

    def of(plan: StepPlan) -> tuple[CellReport, ...]:
        return tuple(
            report(part.sequence, layer, head, start, stop - start, density=(64 / stop,))
            for part in plan.slices
            if part.prompt_len > 100 and part.start < part.prompt_len
            for start, stop in split(SPARSE, part.start, part.start + part.length, part.prompt_len)
        )

    return of


def run_rig(size: int) -> tuple[Generation, list]:
    with Rig(stages=2, ranks=2, spec=SPARSE, pages=100) as rig:
        for handle in rig.shards:
            handle.report = reporting(handle.shard.stage, handle.shard.rank)
        return rig.run(range(size), 3)


def test_a_generation_says_how_it_attended():
    result, events = run_rig(1000)
    found = result.attention
    assert found is not None
    assert (found.mode, found.cells, found.scale_len, found.fallbacks) == ("sparse", 16, 1000, 0)
    assert [layer.layer for layer in found.layers] == [0, 1]
    assert all(len(layer.density) == 2 for layer in found.layers)
    assert found.estimate_share == pytest.approx(0.2)
    expected = sum(64 * 64 / stop for stop in range(64, 961, 64)) + 40 * 64 / 1000
    assert found.density == pytest.approx(expected / 1000)
    assert result.to_json()["attention"]["mode"] == "sparse"
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.processed for event in progress] == [*range(0, 961, 64), 1000]
    etas = [event.eta_ms for event in progress[1:]]
    assert etas == sorted(etas, reverse=True)
    assert etas[-1] == 0


def test_a_dense_prompt_of_the_same_deployment():
    found = run_rig(100)[0].attention
    assert found is not None
    assert (found.mode, found.cells, found.layers) == ("dense", 0, ())


def test_a_cancelled_prompt_keeps_what_it_had():
    with Rig(stages=1, ranks=2, spec=SPARSE, pages=100) as rig:
        for handle in rig.shards:
            handle.report = reporting(0, handle.shard.rank)
            handle.hold()
        ticket, _ = rig.submit(range(1000))
        for handle in rig.shards:
            handle.let(2)
        rig.engine.cancel(ticket)
        for handle in rig.shards:
            handle.let(100)
        result = ticket.wait(WAIT)
        rig.engine.check_integrity()
    assert result.finish_reason is FinishReason.CANCELLED
    assert result.attention is not None
    assert result.attention.cells <= 4


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_an_ended_job():
    registry = CollectorRegistry()
    attention = summed(report(density=(0.04,), dense=(True,)), report(layer=3)).to_json()
    answer = JobAnswer(0, 300, 0, "stop", attention=attention)
    spec = JobSpec(JobInput(prompt="x"), Ask())
    JobMetrics(registry).observe(JobRecord("job", JobState.SUCCEEDED, spec, 0.0, answers=(answer,)), {})
    text = generate_latest(registry).decode()
    assert 'longreach_sparse_density_bucket{layer="0",le="0.05"} 1.0' in text
    assert 'longreach_sparse_recall_sum{layer="3"} 0.9' in text
    assert 'longreach_sparse_dense_fallbacks_total{layer="0"} 1.0' in text
