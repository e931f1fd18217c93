"""The step time model finds the coefficients that made the measurements, and predicts with them."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cluster.config.topology import plan_shards
from cluster.latency.hardware import load_hardware
from cluster.latency.model import LatencyModel, counts_of, visited_share
from cluster.latency.pipeline_work import stage_works
from cluster.planner.subject import as_sparse, load_subject
from cluster.scheduler.chunking import Chunk, chunks
from protos.jobs.sampling import SamplingParams
from protos.model.spec import HeadBudget, SparseSpec
from protos.stage.messages import CellReport, SampleSpec, SequenceSlice, StepPlan
from tests.support.latency.recorded import recorded
from tests.support.paths import NEEDLE
from tests.support.rigs.scheduler import long_spec


def plan(*parts: tuple[int, int]) -> StepPlan:
    """A step of (start, length) slices."""
    slices = [SequenceSlice(i, start, length, 1 << 20, (), (), 1) for i, (start, length) in enumerate(parts)]
    return StepPlan(1, tuple(slices))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), [1, 0, 0, 0]),
        (((0, 1),), [1, 1, 1, 1]),
        (((0, 67),), [1, 67, 67, 67 * 68 // 2]),
        (((100, 1),), [1, 1, 101, 101]),
        (((100, 10), (0, 4)), [1, 14, 114, 10 * 100 + 55 + 10]),
    ],
)
def test_features(parts: tuple[tuple[int, int], ...], expected: list[int]):
    steps, tokens, contexts, pairs = expected
    assert LatencyModel().features(plan(*parts)) == (steps, 0, tokens, contexts, pairs, 0, 0)


def seconds(step: StepPlan, truth: tuple[float, ...], model: LatencyModel | None = None, reports: Any = ()) -> float:
    """The time of a step whose (step, token of context, token, pair) cost so much."""
    steps, _, tokens, contexts, pairs, _, _ = (model or LatencyModel()).features(step, reports)
    c, g, b, a = truth
    return c * steps + g * contexts + b * tokens + a * pairs


def training(rng: random.Random, truth: tuple[float, ...], steps: int = 200, noise: float = 0.0) -> LatencyModel:
    model = LatencyModel()
    for _ in range(steps):
        chunk = (rng.randrange(0, 500_000, 1000), rng.choice((256, 512, 2048)))
        decodes = [(rng.randrange(1, 300_000), 1) for _ in range(rng.randrange(4))]
        step = plan(*decodes) if decodes and rng.random() < 0.3 else plan(chunk, *decodes)
        model.observe(step, seconds(step, truth) * (1 + rng.gauss(0, noise)))
    return model


@pytest.mark.parametrize("truth", [(0.01, 1e-8, 2e-4, 3e-10), (0.02, 0.0, 1e-4, 0.0), (1e-3, 0.0, 5e-3, 3e-8)])
def test_exact_measurements_give_the_coefficients(truth: tuple[float, ...]):
    model = training(random.Random(1), truth)
    for step in (plan((0, 1)), plan((400_000, 2048)), plan((100_000, 1), (5, 1))):
        assert model.predict(step) == pytest.approx(seconds(step, truth), rel=0.02, abs=1e-5)
    assert all(coefficient >= 0 for coefficient in model.coefficients)


def test_noise_does_not_lead_far_astray():
    truth = (0.01, 1e-8, 2e-4, 3e-10)
    model = training(random.Random(2), truth, noise=0.1)
    for step in (plan((0, 2048)), plan((400_000, 2048))):
        assert model.predict(step) == pytest.approx(seconds(step, truth), rel=0.15)


def test_a_busy_machine_is_predicted_as_it_is():
    """Of steps that take one, two or six times as long, predictions are right in sum."""
    model, rng, done = LatencyModel(), random.Random(7), 0.0
    for number in range(400):
        step = plan((rng.randrange(0, 100_000, 1000), 1024))
        took = seconds(step, (0.01, 0.0, 2e-4, 3e-10)) * rng.choice((1, 1, 2, 6))
        if number >= 200:
            done += model.predict(step) / took
        model.observe(step, took)
    mean = sum(1 / factor for factor in (1, 1, 2, 6)) / 4 * 2.5  # of the prediction over a measured time
    assert done / 200 == pytest.approx(mean, rel=0.15)


# --- steps that other programs disturb --------------------------------------------------------------------------------


def decode_step(context: int) -> StepPlan:
    """A step that only decodes, of one row."""
    sample = SampleSpec(SamplingParams(), 0)
    return StepPlan(1, (SequenceSlice(1, context, 1, 20, (), (), 1, sample),))


class Decoding:
    """A head's model that learns decode steps, one after the other, of times that scatter by a share `noise`."""

    def __init__(self, seed: int, noise: float) -> None:
        given = load_subject(NEEDLE, "cpu", chunk=2048)
        self.model = LatencyModel(given.spec, stage_works(given), load_hardware()["cpu-other"].costs(2))
        self.rng, self.noise, self.number = random.Random(seed), noise, 0

    def take(self, seconds: float, context: int | None = None) -> float:
        """Learn a step of about so many seconds; returns the prediction over them, made before."""
        self.number += 1
        step = decode_step(self.number if context is None else context)
        predicted = self.model.predict(step)
        self.model.observe(step, seconds * (1 + self.rng.gauss(0, self.noise)))
        return predicted / seconds


@pytest.mark.parametrize(("noise", "length"), [(0.0, 10), (0.1, 8), (0.2, 13)])
def test_bursts_of_late_steps_do_not_lead_astray(noise: float, length: int):
    decoding = Decoding(length, noise)
    for _ in range(100):
        decoding.take(0.016)
    for number in range(450):
        is_late = number % 150 < length
        share = decoding.take(0.1 if is_late else 0.016) * (0.1 / 0.016 if is_late else 1.0)
        assert share == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
def test_a_machine_that_became_slower_is_learned(noise: float):
    """Within 60 steps, also some steps after a burst; then it is fast again, which takes longer."""
    decoding = Decoding(3, noise)
    for number in range(200):
        decoding.take(0.1 if 130 <= number < 140 else 0.016)
    for number in range(120):
        share = decoding.take(0.04)
        assert number < 60 or share == pytest.approx(1.0, abs=0.15)
    for number in range(150):
        share = decoding.take(0.016)
        assert number < 120 or share == pytest.approx(1.0, abs=0.15)


def test_busy_decode_steps_are_predicted_as_they_are():
    """As above in steps of 16 ms: those that take six times as long come here and there, not in bursts."""
    decoding, done = Decoding(7, 0.0), 0.0
    for number in range(400):
        factor = decoding.rng.choice((1, 1, 2, 6))
        share = decoding.take(0.016 * factor) * factor
        done += share if number >= 200 else 0.0
    assert done / 200 == pytest.approx(2.5, rel=0.15)


def test_short_answers_about_a_longer_context_are_learned():
    """Their steps are late until the model knows what a context costs, and never more than five in a row."""
    decoding = Decoding(1, 0.1)
    for _ in range(200):
        decoding.take(0.016)
    for number in range(20):
        for _ in range(5):
            share = decoding.take(0.064, context=100_000)
            assert number < 3 or share == pytest.approx(1.0, abs=0.15)
        for _ in range(30):
            assert decoding.take(0.016) == pytest.approx(1.0, abs=0.15)


def test_long_steps_count_at_once():
    """Chunks of a second are few, and no burst passes in one: the first that takes three times as long counts."""
    model, step = LatencyModel(), plan((0, 1024))
    for _ in range(100):
        model.observe(step, 1.0)
    for _ in range(5):
        before = model.predict(step)
        model.observe(step, 3.0)
        assert model.predict(step) > 1.005 * before


def test_the_past_is_forgotten():
    slow, fast = (0.1, 0.0, 1e-3, 0.0), (0.01, 0.0, 1e-4, 0.0)
    model = training(random.Random(3), slow)
    rng = random.Random(4)
    for _ in range(300):
        step = plan((rng.randrange(1000), rng.choice((64, 512))))
        model.observe(step, seconds(step, fast))
    assert model.predict(plan((0, 512))) == pytest.approx(seconds(plan((0, 512)), fast), rel=0.05)


@pytest.mark.parametrize("measured", [0.0, 1e-9, 1e6])
def test_a_single_extreme_step_gives_finite_answers(measured: float):
    model = LatencyModel()
    model.observe(plan((0, 64)), measured)
    assert model.predict(plan((0, 64))) == pytest.approx(measured, rel=0.01, abs=1e-6)
    assert model.predict(plan((0, 4096))) >= 0


def test_before_any_step():
    model = LatencyModel()
    assert model.coefficients == (0,) * 7
    assert model.predict(plan((0, 9))) == 0
    assert model.predict_chunks([Chunk(0, 10)]) is None


@pytest.mark.parametrize(("start", "stop", "chunk"), [(0, 1, 512), (0, 512, 512), (0, 513, 512), (777, 9973, 512)])
def test_a_prefill_is_the_sum_of_its_chunks(start: int, stop: int, chunk: int):
    model = training(random.Random(5), (0.01, 1e-8, 2e-4, 3e-10))
    steps = [plan((at, min(chunk, stop - at))) for at in range(start, stop, chunk)]
    predicted = model.predict_chunks(list(chunks(None, start, stop, stop, chunk)))
    assert predicted == pytest.approx(sum(map(model.predict, steps)))


def test_a_finished_prefill_takes_no_time():
    model = training(random.Random(6), (0.01, 0.0, 1e-4, 0.0), steps=5)
    assert model.predict_chunks([]) == 0


# --- sparse cells -----------------------------------------------------------------------------------------------------

SPEC = long_spec(100, 8192)


def cell(start: int, density: float, sequence: int = 0, length: int = 8192) -> CellReport:
    return CellReport(sequence, 0, 0, start, length, (density,), (1.0,), (1.0,), (False,))


def test_the_share_a_slice_visited():
    part = SequenceSlice(3, 0, 4, 1000, (), (), 1)
    assert visited_share(part, ()) is None
    assert visited_share(part, [cell(0, 0.5, sequence=4)]) is None
    reports = [cell(0, 1.0, 3, 2), cell(2, 0.5, 3, 2), cell(0, 0.0, 4, 2)]
    assert visited_share(part, reports) == pytest.approx((3 * 1.0 + 7 * 0.5) / 10)
    two_heads = CellReport(3, 0, 0, 0, 4, (0.2, 0.4), (1, 1), (1, 1), (False, False))
    assert visited_share(part, [two_heads]) == pytest.approx(0.3)


def test_reported_shares_are_features_and_others_are_estimated():
    model, step = LatencyModel(SPEC), plan((8192, 8192))
    pairs = 8192 * 8192 + 8192 * 8193 / 2
    assert model.features(step)[4] == pairs, "dense until a cell was seen"
    assert model.features(step, [cell(8192, 0.25)])[4] == pytest.approx(pairs / 4)
    model.observe(step, 1.0, [cell(8192, 0.25)])
    assert model.features(step)[4] == pytest.approx(pairs / 4)
    assert LatencyModel().features(step, [cell(8192, 0.25)])[4] == pairs, "without a spec every row is dense"


def density_of(context: float, keys: float, power: float) -> float:
    return min(1.0, keys * (context / 1e5) ** power / context)


@pytest.mark.parametrize(("keys", "power"), [(6000, 0.0), (3000, 0.4), (30_000, 0.9)])
def test_the_rest_of_a_sparse_prefill_is_predicted(keys: float, power: float):
    """After a tenth of a prompt the prediction is right within a fifth, and it falls with every cell."""
    truth, size, model = (0.05, 1e-7, 1e-5, 2e-9), 1_000_000, LatencyModel(SPEC)
    todo = list(chunks(SPEC, 0, size, size, 8192))
    steps = []
    for chunk in todo:
        step = plan((chunk.start, chunk.stop - chunk.start))
        length = chunk.stop - chunk.start
        mean = chunk.start + (length + 1) / 2
        reports = [cell(chunk.start, density_of(mean, keys, power), length=length)]
        steps.append((step, reports, seconds(step, truth, model, reports)))
    predictions = []
    for number, (step, reports, duration) in enumerate(steps, start=1):
        model.observe(step, duration, reports)
        predictions.append(model.predict_chunks(todo[number:]))
    assert predictions[-1] == 0
    tenth = len(steps) // 10
    assert predictions[tenth] == pytest.approx(sum(duration for *_, duration in steps[tenth + 1 :]), rel=0.2)
    assert all(after <= before * 1.02 for before, after in pairwise(predictions[tenth:]))


# --- a real prompt ----------------------------------------------------------------------------------------------------


def recorded_errors(name: str, usual: tuple[float, ...] | None, every: int = 0, late: float = 1.0) -> list[float]:
    """By which shares of the truth the rest of a recorded sparse prompt of 256K was predicted after each chunk.

    Args:
        every, late: each so manieth chunk takes so many times as long as was recorded.
    """
    given = load_subject(NEEDLE, "cpu", chunk=2048)
    sparse = SparseSpec(threshold=0, cell=2048, uniform=HeadBudget(1024, 2048), synthetic=True)
    given = replace(given, spec=replace(given.spec, sparse=sparse))
    size = 1 << 18
    steps = [
        step._replace(seconds=late * step.seconds)
        if every and step.prompt_len == size and step.start // 2048 % every == every - 1
        else step
        for step in recorded(name)["steps"]
    ]
    prompt = [step for step in steps if step.prompt_len == size]
    model, found = LatencyModel(given.spec, stage_works(given), usual), []
    for step in steps:
        step.teach(model)
        done = step.start + step.length
        if step.prompt_len == size and done < size * 19 // 20:
            left = sum(later.seconds for later in prompt if later.start >= done)
            predicted = model.predict_chunks(list(chunks(given.spec, done, size, size, 2048)))
            assert predicted is not None
            found.append(predicted / left - 1)
    return found


def test_a_head_that_knows_nothing_predicts_a_recorded_prompt() -> None:
    """At a tenth the rest of 256K is predicted within 15 %: from the first chunks alone it is a third too low."""
    with_usual = recorded_errors("needle-256k-sparse", load_hardware()["cpu-avx512-bf16"].costs(2))
    without, tenth = recorded_errors("needle-256k-sparse", None), 12
    assert abs(with_usual[tenth]) < 0.15 < 0.3 < abs(without[tenth])
    worse = [abs(one) - abs(other) for one, other in zip(with_usual, without, strict=True)]
    assert max(worse[tenth:]) < 0.03, "no later prediction loses by it"


def test_late_chunks_among_the_first_move_a_prediction_little() -> None:
    """Some of the first tenth's chunks take a fifth longer than others: counted in full, the rest was 39 % too long."""
    found, tenth = recorded_errors("needle-256k-sparse-amx", load_hardware()["cpu-amx"].costs(2)), 12
    assert abs(found[tenth]) < 0.15
    assert max(map(abs, found[tenth:])) < 0.2


@pytest.mark.parametrize(("every", "late"), [(2, 2.0), (3, 2.0), (4, 3.0), (8, 2.0)])
def test_late_chunks_here_and_there_count_in_sum(every: int, late: float) -> None:
    """As beside a process that wakes now and then: were they only counted less, the rest would be up to 28 % off."""
    found = recorded_errors("needle-256k-sparse-amx", load_hardware()["cpu-amx"].costs(2), every, late)
    assert sum(map(abs, found[20:50])) / 30 < 0.1


def test_sparse_slices_read_what_they_visit() -> None:
    given = as_sparse(load_subject(NEEDLE, "cpu"))
    model, size = LatencyModel(given.spec), 1 << 18
    start, length = 2 * given.spec.sparse.cell, given.spec.sparse.cell
    part = SequenceSlice(1, start, length, size, (), (), 1)
    report = CellReport(1, 0, 0, start, length, (0.25,), (1.0,), (1.0,), (False,))
    counts = model.counts(StepPlan(1, (part, replace(part, sequence=2, start=0, length=1, prompt_len=1))), [report])
    assert counts.cells == start + length
    assert counts.contexts == pytest.approx(0.25 * (start + (length + 1) / 2) + 1)


def test_a_step_is_measured_at_the_stage_with_most_to_do():
    """Not at the one with most layers, where layers differ."""
    given = load_subject(NEEDLE, "cpu")
    spec = replace(given.spec, num_hidden_layers=6, mlp_only_layers=(0, 1), intermediate_size=1 << 16)
    works = stage_works(replace(given, spec=spec, shards=plan_shards(spec, 2, 1, [2, 4])))
    chunk, usual = plan((0, 512)), load_hardware()["cpu-other"].costs()
    by_cost, by_layers = LatencyModel(spec, works, usual), LatencyModel(spec, works)
    assert (by_cost.features(chunk)[0], by_layers.features(chunk)[0]) == (2, 4)
    same = stage_works(replace(given, shards=plan_shards(given.spec, 2, 1)))
    assert LatencyModel(given.spec, same, usual)._prefill_work is same[1], "of equal ones the last"


def test_counts_of_chunks():
    spec = as_sparse(load_subject(NEEDLE, "cpu")).spec
    steps = [Chunk(0, 10), Chunk(10, 14, True)]
    counts = counts_of(spec, steps, lambda contexts: contexts / 2)
    assert [np.asarray(part).tolist() for part in counts] == [[10, 4], [0, 1], [10, 6.25], [55, 25], [0, 14]]
