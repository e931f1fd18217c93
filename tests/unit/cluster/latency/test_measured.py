"""Measured steps go before the table: of this model in this layout, else in another; those of other models do not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.deployment import Deployment
from cluster.latency.hardware import load_hardware
from cluster.latency.latency_file import LatencyFile, Measured
from cluster.latency.measured import Costs, Measurements
from cluster.latency.model import LatencyModel
from cluster.latency.pipeline_work import measured_on, stage_times, stage_works
from cluster.planner.forecast import predict
from cluster.planner.memory import relayout
from cluster.planner.plan import make_plan
from cluster.planner.subject import as_dense, as_sparse, load_subject, with_chunks
from cluster.planner.target import cpu_target
from protos.model.spec import HeadBudget, SparseSpec
from protos.stage.messages import CellReport, SequenceSlice, StepPlan
from tests.support.latency.recorded import recorded
from tests.support.paths import NEEDLE
from tests.support.planner.models import subject

CORES = 4
TRUTH = (1e-4, 4e-11, 1e-12, 5e-11, 2e-12, 3e-12, 0.0)
USUAL = (3e-4, 2e-11, 2e-12, 2e-11, 2e-12, 2e-12, 2e-10)


def plan(start: int, length: int, prompt: int) -> StepPlan:
    return StepPlan(1, (SequenceSlice(0, start, length, prompt, (), (), 1),))


def run_head(
    data_dir: Path, given: Deployment, truth: tuple[float, ...] = TRUTH, of: Measured | None = None, noise: float = 0.0
) -> None:  # fmt: skip
    """Leave what a head that computes with these costs would leave after a prompt and some decode steps."""
    rng = random.Random(1)
    model = LatencyModel(given.spec, stage_works(given))
    for step in range(40):
        start = step * 2048
        for made in (plan(start, 2048 if step % 3 else 512, 81_920), plan(start, 1, start)):
            part = made.slices[0]
            is_cell = given.spec.sparse is not None and part.length > 1
            reports = [CellReport(0, 0, 0, start, part.length, (0.2,), (1,), (1,), (False,))] if is_cell else []
            took = sum(a * b for a, b in zip(model.features(made, reports), truth, strict=True))
            model.observe(made, took * (1 + rng.gauss(0, noise)), reports)
    LatencyFile(data_dir, of or measured_on(given, "avx512", CORES)).save(model)


def small(folder: Path) -> Deployment:
    return subject(folder, "cpu", num_hidden_layers=4, num_experts=16, vocab_size=1000, eos_token_id=2)


def test_steps_of_this_model_and_layout(tmp_path: Path):
    given = small(tmp_path)
    run_head(tmp_path / "data", given)
    costs = Measurements.of(tmp_path / "data", CORES).costs_of(given, USUAL)
    assert costs is not None
    assert costs.source == "80 steps measured here (this model, 1 x 1)"
    truth = replace(costs, seconds=TRUTH)
    for context in (10_000, 200_000):
        found, wanted = predict(given, context, costs), predict(given, context, truth)
        assert found.prefill_s == pytest.approx(wanted.prefill_s, rel=0.05)
        assert found.decode_s == pytest.approx(wanted.decode_s, rel=0.05)
    assert costs.keys is None, "no cell was measured"


def test_other_layouts_and_threads_are_scaled(tmp_path: Path):
    given = small(tmp_path)
    run_head(tmp_path / "data", given)
    measurements = Measurements.of(tmp_path / "data", CORES)
    halved = (USUAL[0], *(2 * cost for cost in USUAL[1:6]), USUAL[6])  # usual with half of the threads
    one = measurements.costs_of(given, USUAL)
    two = measurements.costs_of(relayout(given, 2, 1), halved)
    assert one is not None
    assert two is not None
    assert two.source == "80 steps measured here (this model, other layouts)"
    assert two.seconds[2] == pytest.approx(2 * one.seconds[2]), "half of the threads for each stage"
    assert two.seconds[0] == one.seconds[0]
    assert one.seconds[6] > 0, "no step had reductions: in the usual ratio to the rest"


def test_what_layers_of_each_kind_took_in_this_deployment(tmp_path: Path):
    shape = {"mlp_only_layers": [0, 1], "intermediate_size": 4096, "vocab_size": 1000, "eos_token_id": 2}
    given = relayout(subject(tmp_path, "cpu", num_hidden_layers=6, num_experts=16, **shape), 2, 1)
    times = stage_times(given, USUAL)
    model = LatencyModel(given.spec, stage_works(given), USUAL, times)
    assert times is not None
    for step in range(40):
        made = plan(step * 2048, 2048 if step % 3 else 512, 1 << 20)
        first, second = (float(work.seconds(model.counts(made), USUAL)) for work in stage_works(given))
        model.observe(made, 3 * first, stage_s={0: 3 * first, 1: second})
    of = measured_on(given, "", CORES)
    LatencyFile(tmp_path, of).save(model)
    found = Measurements.of(tmp_path, CORES)
    costs = found.layer_costs_of(given, USUAL)
    assert costs is not None
    assert (costs.seconds, costs.source) == (USUAL, "80 times of stages measured here")
    assert costs.parts == times.scales
    assert costs.parts[0] > 2 * costs.parts[1], "the first stage has the dense layers"
    assert found.layer_costs_of(relayout(given, 3, 1), USUAL) is None, "another layout"
    learned = model.to_json()
    for unusable in (learned | {"stages": {}}, {k: v for k, v in learned.items() if k != "stages"}, {}):
        assert Measurements([(of, unusable)], CORES).layer_costs_of(given, USUAL) is None
    alike = relayout(small(tmp_path), 2, 1)
    assert Measurements([(measured_on(alike, "", CORES), learned)], CORES).layer_costs_of(alike, USUAL) is None


@pytest.mark.parametrize("unit", range(6))
def test_a_cost_that_steps_put_at_zero_is_not_counted_twice(tmp_path: Path, unit: int):
    """Its time is in what other units cost: nothing is added for it, however slow the table says that this is."""
    given = small(tmp_path)
    truth = tuple(0.0 if index == unit else cost for index, cost in enumerate(TRUTH))
    run_head(tmp_path / "data", given, truth, noise=0.02)
    costs = Measurements.of(tmp_path / "data", CORES).costs_of(given, tuple(10 * cost for cost in USUAL))
    assert costs is not None
    found, wanted = predict(given, 60_000, costs), predict(given, 60_000, replace(costs, seconds=truth))
    assert found.prefill_s == pytest.approx(wanted.prefill_s, rel=0.05)
    assert found.decode_s == pytest.approx(wanted.decode_s, rel=0.05)


def benchmark_model(folder: Path) -> Deployment:
    """The one of the recorded steps, in two stages and chunks of one size."""
    shape = {"vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128}
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "eos_token_id": 2}
    return with_chunks(relayout(as_dense(subject(folder, "cpu", **shape, **heads, **experts)), 2, 1), False)


def test_recorded_steps_of_two_stages(tmp_path: Path):
    """Decoding at 8K is predicted from steps up to 4K, of which some were slow, within 20 %."""
    given = benchmark_model(tmp_path)
    usual, found = load_hardware()["cpu-avx512-bf16"].costs(1, sharers=2), recorded("benchmodel-2x1")
    model = LatencyModel(given.spec, stage_works(given))
    for step in found["steps"]:
        step.teach(model)
    of = measured_on(given, "", 2)
    costs = Measurements([(of, model.to_json())], 2).costs_of(given, usual)
    assert costs is not None
    forecast = predict(given, 8192, replace(costs, hop_s=0.001))
    assert forecast.prefill_s == pytest.approx(found["first_token_s"], rel=0.1)
    assert forecast.decode_s == pytest.approx(found["decode_s"], rel=0.2)


@pytest.mark.parametrize("other", [{"model": "another"}, {"dtype": "float32"}])
def test_another_model_here_says_nothing(tmp_path: Path, other: dict[str, str]):
    given = small(tmp_path)
    run_head(tmp_path / "data", given, of=replace(measured_on(given, "", CORES), **other))
    assert Measurements.of(tmp_path / "data", CORES).costs_of(given, USUAL) is None
    target = cpu_target(load_hardware(), "64GB", CORES, tmp_path / "data")
    made = make_plan(given, 8192, target)
    assert made["times_from"].startswith("hardware table: 4 x x86 core with ")
    assert made["times_from"].endswith(" (no steps of this model were measured here)")
    assert any("assumed" in note for note in made["notes"])
    assert target.costs_of(given).seconds == cpu_target(load_hardware(), "64GB", CORES).costs_of(given).seconds


def test_recorded_steps_of_the_demo_mislead_about_a_larger_model(tmp_path: Path):
    """A unit of work costs more in its steps than in the benchmark model's, whose times the table predicts better."""
    given, demo = benchmark_model(tmp_path), load_subject(NEEDLE, "cpu", chunk=2048)
    sparse = SparseSpec(threshold=0, cell=2048, uniform=HeadBudget(1024, 2048), synthetic=True)
    demo = replace(demo, spec=replace(demo.spec, sparse=sparse))
    row, found = load_hardware()["cpu-avx512-bf16"], recorded("benchmodel-2x1")
    model, usual = LatencyModel(demo.spec, stage_works(demo), row.costs(2)), row.costs(1, sharers=2)
    for step in recorded("needle-256k-sparse")["steps"]:
        step.teach(model)
    of = measured_on(demo, "", 2)
    assert Measurements([(of, model.to_json())], 2).costs_of(given, usual) is None
    renamed = replace(of, model=measured_on(given, "", 2).model)
    misled = Measurements([(renamed, model.to_json())], 2).costs_of(given, usual)
    assert misled is not None

    def errors(costs: Costs) -> tuple[float, float]:
        forecast = predict(given, 8192, replace(costs, hop_s=0.001))
        return forecast.prefill_s / found["first_token_s"] - 1, forecast.decode_s / found["decode_s"] - 1

    for by_demo, by_table in zip(errors(misled), errors(Costs(usual, "")), strict=True):
        assert by_demo > 0.4
        assert abs(by_table) < by_demo - 0.3


def test_another_type_of_kv_is_measured_by_the_same_model(tmp_path: Path):
    given = small(tmp_path)
    run_head(tmp_path / "data", given, of=replace(measured_on(given, "", CORES), kv_dtype="int8"))
    costs = Measurements.of(tmp_path / "data", CORES).costs_of(given, USUAL)
    assert costs is not None
    assert costs.source == "80 steps measured here (this model, other types of KV)"


def test_other_hardware_says_nothing(tmp_path: Path):
    given = small(tmp_path)
    here = measured_on(given, "", CORES)
    for number, of in enumerate((replace(here, hardware="another"), replace(here, cores=64))):
        run_head(tmp_path / str(number), given, of=of)
        assert Measurements.of(tmp_path / str(number), CORES).costs_of(given, USUAL) is None
    assert Measurements.of(tmp_path / "absent", CORES).costs_of(given, USUAL) is None


def test_what_cells_visit_is_kept_for_the_same_sparse_prefill(tmp_path: Path):
    given = small(tmp_path)
    sparse = as_sparse(given)
    run_head(tmp_path / "data", as_dense(given))
    run_head(tmp_path / "data", sparse)
    measurements = Measurements.of(tmp_path / "data", CORES)
    of_sparse, of_dense = measurements.costs_of(sparse, USUAL), measurements.costs_of(given, USUAL)
    assert of_sparse is not None
    assert of_dense is not None
    assert of_sparse.keys is not None
    assert of_dense.keys is None
    assert of_sparse.source.startswith("160 steps")


def test_a_plan_uses_them(tmp_path: Path):
    given = small(tmp_path)
    run_head(tmp_path / "data", given)
    target = cpu_target(load_hardware(), "64GB", CORES, tmp_path / "data")
    made = make_plan(given, 8192, target)
    assert made["times_from"] == "80 steps measured here (this model, 1 x 1)"
    assert not any("assumed" in note for note in made["notes"])
    assert "hardware table" in make_plan(given, 8192, cpu_target(load_hardware(), "64GB", CORES))["times_from"]
