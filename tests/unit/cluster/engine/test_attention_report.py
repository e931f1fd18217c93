"""Reports of sparse cells: how they add up, and where the figures end up."""

import json
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.engine.attention_report import AttentionReport, describe_positions, describe_sparsity
from cluster.engine.in_flight import InFlightStep
from cluster.engine.outputs import Generation, PrefillProgress
from cluster.jobs.model import JobAnswer, JobInput, JobRecord, JobSpec, JobState
from cluster.scheduler.request import FinishReason
from cluster.server.metrics import JobMetrics
from protos.jobs.sampling import AnswerOptions
from protos.model.grid import split
from protos.model.spec import DualChunkSpec, HeadBudget, RopeSpec, SparseSpec
from protos.stage.messages import CellReport, StepPlan
from tests.support.fakes.stage import WAIT, Rig
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.scheduler import PLAIN, long_spec

SPARSE = long_spec(100, 64)


def report(sequence: int = 1, layer: int = 0, head: int = 0, start: int = 0, length: int = 64, **figures) -> CellReport:
    values = {"density": (0.5,), "estimated_recall": (0.99,), "held_out_recall": (0.9,), "dense": (False,)} | figures
    return CellReport(sequence, layer, head, start, length, **values)


def summed(*reports: CellReport):
    log = AttentionReport()
    log.add(1, InFlightStep(StepPlan(1, ()), set(), cells=list(reports), compute_us=1000, estimate_us=250))
    return log.summary(SPARSE, 300, 0)


def test_means_are_weighted_by_tokens_and_worst_cells_are_kept():
    summary = summed(
        report(start=0, length=64, density=(1.0, 0.5), estimated_recall=(1.0, 0.9), held_out_recall=(1.0, 0.6),
               dense=(True, False)),
        report(start=64, length=32, density=(0.1, 0.2), estimated_recall=(0.7, 0.6), held_out_recall=(0.4, 0.9),
               dense=(False, True)),
        report(layer=2, density=(0.25,), held_out_recall=(1.0,), estimated_recall=(1.0,)),
        report(sequence=2, layer=5),
    )  # fmt: skip
    first, second = summary.layers
    assert (first.layer, second.layer, summary.cells, summary.fallbacks) == (0, 2, 2, 2)
    assert first.density == pytest.approx(((64 + 3.2) / 96, (32 + 6.4) / 96))
    assert first.estimated_recall == pytest.approx(((64 + 22.4) / 96, (57.6 + 19.2) / 96))
    assert (first.estimated_recall_min, first.held_out_recall_min) == ((0.7, 0.6), (0.4, 0.6))
    assert first.fallbacks == (1, 1)
    assert summary.density == pytest.approx((67.2 + 38.4 + 16) / 256)
    assert (summary.estimated_recall_min, summary.held_out_recall_min, summary.estimate_share) == (0.6, 0.4, 0.25)
    assert (summary.mode, summary.scale_len) == ("sparse", 300)


def test_heads_of_different_shards_stand_side_by_side():
    summary = summed(
        report(head=2, density=(0.3, 0.4), estimated_recall=(1, 1), held_out_recall=(1, 1), dense=(False, False)),
        report(head=0, density=(0.1, 0.2), estimated_recall=(1, 1), held_out_recall=(1, 1), dense=(False, False)),
    )
    assert summary.layers[0].density == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert summary.cells == 1


@pytest.mark.parametrize(("prompt", "mode"), [(100, "dense"), (101, "sparse")])
def test_a_prompt_without_reports(prompt: int, mode: str):
    summary = AttentionReport().summary(SPARSE, prompt, 7)
    assert summary is not None
    assert (summary.mode, summary.scale_len, summary.cells, summary.density, summary.layers) == (mode, 7, 0, 1.0, ())
    assert AttentionReport().summary(None, prompt, 0) is None


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
         "vertical-slash above 32768 tokens, cells of 8192, last 64, 10 columns and 20 diagonals, floor 0.9 for 1"),
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
        for shard in rig.shards:
            shard.report = reporting(shard.shard.stage, shard.shard.rank)
        return rig.run(range(size), 3)


def test_a_generation_says_how_it_attended():
    result, events = run_rig(1000)
    summary = result.attention
    assert summary is not None
    assert (summary.mode, summary.cells, summary.scale_len, summary.fallbacks) == ("sparse", 16, 1000, 0)
    assert [layer.layer for layer in summary.layers] == [0, 1]
    assert all(len(layer.density) == 2 for layer in summary.layers)
    assert summary.estimate_share == pytest.approx(0.2)
    expected = sum(64 * 64 / stop for stop in range(64, 961, 64)) + 40 * 64 / 1000
    assert summary.density == pytest.approx(expected / 1000)
    assert result.to_json()["attention"]["mode"] == "sparse"
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [event.processed for event in progress] == [*range(0, 961, 64), 1000]
    etas = [event.eta_ms for event in progress[1:]]
    assert etas == sorted(etas, reverse=True)
    assert etas[-1] == 0


def test_a_dense_prompt_of_the_same_deployment():
    summary = run_rig(100)[0].attention
    assert summary is not None
    assert (summary.mode, summary.cells, summary.layers) == ("dense", 0, ())


def test_a_cancelled_prompt_keeps_what_it_had():
    with Rig(stages=1, ranks=2, spec=SPARSE, pages=100) as rig:
        for shard in rig.shards:
            shard.report = reporting(0, shard.shard.rank)
            shard.hold()
        handle, _ = rig.submit(range(1000))
        for shard in rig.shards:
            shard.let(2)
        rig.engine.cancel(handle)
        for shard in rig.shards:
            shard.let(100)
        result = handle.wait(WAIT)
        check_engine(rig.engine)
    assert result.finish_reason is FinishReason.CANCELLED
    assert result.attention is not None
    assert result.attention.cells <= 4


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_an_ended_job():
    registry = CollectorRegistry()
    attention = summed(report(density=(0.04,), dense=(True,)), report(layer=3)).to_json()
    answer = JobAnswer(0, 300, 0, "stop", attention=attention)
    spec = JobSpec(JobInput(prompt="x"), AnswerOptions())
    JobMetrics(registry).observe(JobRecord("job", JobState.SUCCEEDED, spec, 0.0, answers=(answer,)), {})
    text = generate_latest(registry).decode()
    assert 'longreach_sparse_density_bucket{layer="0",le="0.05"} 1.0' in text
    assert 'longreach_sparse_recall_sum{layer="3"} 0.9' in text
    assert 'longreach_sparse_dense_fallbacks_total{layer="0"} 1.0' in text
