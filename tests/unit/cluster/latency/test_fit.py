"""Costs follow from steps where these determine them, and from usual ratios where they do not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.latency.fit import Costs, Sums, fit
from cluster.latency.step_work import UNITS

USUAL: Costs = (2e-4, 5e-11, 5e-12, 5e-11, 6e-12, 8e-12, 2e-10)
TRUTH: Costs = (6e-4, 3e-11, 8e-12, 9e-11, 4e-12, 2e-12, 1e-9)


def seconds(units: Costs, costs: Costs) -> float:
    return float(np.dot(units, costs))


def chunk(start: int, tokens: int = 2048) -> Costs:
    """The units of a chunk of a sparse prefill by a model like the demo's."""
    stop = start + tokens
    pairs = tokens * min(start + tokens / 2, 4096.0)
    return (4.0, 4e6, 3e6 * tokens, 2048.0 * stop, 4096.0 * pairs, 5e5 * stop, 4096.0 * tokens)


def decode(context: int) -> Costs:
    return (4.0, 1e6, 3e6, 2048.0 * context, 4096.0 * context, 0.0, 4096.0)


def sums(*steps: Costs, costs: Costs = TRUTH, noise: float = 0.0) -> Sums:
    made, rng = Sums(), random.Random(1)
    for units in steps:
        took = seconds(units, costs) * (1 + rng.gauss(0, noise))
        made.add(units, took, took)
    return made


def test_many_steps_overrule_usual_costs() -> None:
    starts = [100_003 * number % 1_000_000 for number in range(100)]
    parts = sums(*map(chunk, starts)), sums(*map(decode, starts))
    found = fit(parts, USUAL)
    assert min(found) >= 0
    for units in (chunk(0), chunk(2_000_000), decode(100), decode(1_000_000)):
        assert seconds(units, found) == pytest.approx(seconds(units, TRUTH), rel=0.05)
        assert seconds(units, fit(parts)) == pytest.approx(seconds(units, TRUTH), rel=0.05)


def test_one_step_scales_usual_costs() -> None:
    """Three times as slow as usual in one kind of step: so it is in all, and only ratios of usual costs matter."""
    slow = tuple(3 * cost for cost in USUAL)
    part = sums(chunk(0), costs=slow)
    for scale in (1e-6, 1.0, 1e6):
        assert fit((part,), tuple(scale * cost for cost in USUAL)) == pytest.approx(slow, rel=1e-3)


def test_units_that_no_step_had_keep_their_ratio() -> None:
    part = sums(*(decode(context) for context in range(1000, 50_000, 1000)), costs=USUAL)
    assert fit((part,))[UNITS.index("estimate_flops")] == 0
    assert fit((part,), USUAL)[UNITS.index("estimate_flops")] == pytest.approx(USUAL[5], rel=1e-3)


def test_a_usual_cost_that_is_far_too_low_holds_nothing_back() -> None:
    """Layers cost 200 times what is usual, as where a network lies between shards."""
    truth = (200 * USUAL[0], *USUAL[1:])
    part = sums(*(decode(context) for context in range(1000, 50_000, 1000)), costs=truth)
    found = fit((part, sums(chunk(0), chunk(2048), costs=truth)), USUAL)
    for units in (decode(100), decode(100_000), chunk(0)):
        assert seconds(units, found) == pytest.approx(seconds(units, truth), rel=0.1)


def test_without_steps_all_is_zero() -> None:
    assert fit((Sums(), Sums()), USUAL) == fit((Sums(),)) == (0.0,) * len(UNITS)


@pytest.mark.parametrize("measured", [0.0, 1e-9, 1e6])
def test_extreme_steps_give_finite_costs(measured: float) -> None:
    part = Sums()
    part.add(chunk(0), measured, measured)
    found = fit((part,), USUAL)
    assert np.isfinite(found).all()
    assert seconds(chunk(0), found) == pytest.approx(measured, rel=0.01, abs=1e-6)


def late(count: int, part: Sums) -> list[bool]:
    """Late decode steps; returns whether each shows that the machine has become slower."""
    usual = seconds(decode(10), TRUTH)
    return [part.add(decode(10), 3 * usual, usual) for _ in range(count)]


def test_what_is_late_is_known_after_fifty_steps() -> None:
    part = sums(*[decode(10)] * 49)
    before = np.array(part.gram)
    late(1, part)
    assert (np.array(part.gram) != before).any()
    after = np.array(part.gram)
    late(5, part)
    assert part.steps == 55
    assert (np.array(part.gram) == after).all(), "not yet"


def test_a_longer_run_of_late_steps_than_a_burst_outweighs_the_past() -> None:
    part = sums(*[decode(10)] * 100)
    assert late(20, part) == [False] * 15 + [True] + [False] * 4, "and again only after as many"
    assert part.steps == 120
    assert seconds(decode(10), fit((part,), USUAL)) == pytest.approx(3 * seconds(decode(10), TRUTH), rel=0.3)


def test_of_a_burst_one_step_counts() -> None:
    usual = seconds(decode(10), TRUTH)
    parts = [sums(*[decode(10)] * 100) for _ in range(2)]
    for part, count in zip(parts, (1, 15), strict=True):
        assert not any(late(count, part))
        assert not part.add(decode(10), usual, usual)
    assert np.allclose(parts[0].gram, parts[1].gram)
    assert np.allclose(parts[0].moment, parts[1].moment)


def test_sums_of_two_runs() -> None:
    steps = [chunk(0), chunk(4096), decode(10)]
    both, other = sums(*steps[:2]), sums(*steps[2:])
    both.absorb(Sums.from_json(other.to_json()))
    assert both.steps == 3
    assert fit((both,), USUAL) == pytest.approx(fit((sums(*steps[:2]), other), USUAL))


@pytest.mark.parametrize("bad", [None, {}, {"steps": -1}, {"steps": 1, "gram": [[1]], "moment": [1.0]}])
def test_what_are_no_sums_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="it has"):
        Sums.from_json(bad)


def learn(factors: Sequence[float]) -> Costs:
    """Return what chunks of a prefill teach that take so many times their true seconds, each as expected till then."""
    part, costs = Sums(), USUAL
    for number, factor in enumerate(factors):
        units = chunk(2048 * number)
        took = factor * seconds(units, TRUTH)
        part.add(units, took, seconds(units, costs) if number else took)
        costs = fit((part,), USUAL)
    return costs


def test_one_late_step_among_the_first_moves_little() -> None:
    """The rest of a long prompt; counted in full, it would move that by 23 %."""
    rest = [chunk(2048 * number) for number in range(13, 128)]
    quiet, late = (learn([1.0] * 11 + [factor, 1.0]) for factor in (1.0, 1.3))
    assert sum(seconds(units, late) for units in rest) == pytest.approx(
        sum(seconds(units, quiet) for units in rest), rel=0.1
    )


def test_a_machine_that_becomes_slower_among_the_first_steps_is_learned() -> None:
    costs = learn([1.0] * 20 + [3.0] * 15)
    assert seconds(chunk(2048 * 35), costs) == pytest.approx(3 * seconds(chunk(2048 * 35), TRUTH), rel=0.1)


@pytest.mark.parametrize("first", [0.2, 5.0, 100.0])
def test_a_first_step_unlike_the_others_is_no_anchor(first: float) -> None:
    costs = learn([first] + [1.0] * 12)
    assert seconds(chunk(2048 * 13), costs) == pytest.approx(seconds(chunk(2048 * 13), TRUTH), rel=0.1)


def test_first_steps_that_count_less_count_in_the_level() -> None:
    part, costs = Sums(), USUAL
    for number in range(16):
        truth = seconds(chunk(2048 * number), TRUTH)
        expected = seconds(chunk(2048 * number), costs) if number else truth
        part.add(chunk(2048 * number), truth * (2.0 if number % 4 == 3 else 1.0), expected)
        costs = fit((part,), USUAL)
    counted = range(2, 16)  # without the very first, which may have to warm up
    took = sum(seconds(chunk(2048 * number), TRUTH) * (2.0 if number % 4 == 3 else 1.0) for number in counted)
    fitted = sum(seconds(chunk(2048 * number), costs) for number in counted)
    assert part.level(costs) == pytest.approx(took / fitted)
    assert 1.05 < part.level(costs) < 1.3
    assert Sums().level(USUAL) == 1.0
    assert sums(*map(chunk, range(0, 2048 * 60, 2048))).level(USUAL) == 1.0, "known by then"
