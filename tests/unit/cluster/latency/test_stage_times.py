"""What layers of each kind take is told by stages that have them in other proportions."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from cluster.latency.fit import Costs
from cluster.latency.stage_times import PARTS, StageTimes, layer_parts
from cluster.latency.step_work import UNITS, StepCounts, Work, causal_pairs

USUAL: Costs = (1e-4, 0.0, 1e-12, 0.0, 1e-12, 0.0, 0.0)


class Layer(Work):
    """A layer of so many flops a token, and attention alike in all."""

    def __init__(self, flops: float) -> None:
        self._flops = flops

    def units(self, counts: StepCounts) -> tuple[Any, ...]:
        return (1.0, 0.0, self._flops * counts.tokens, 0.0, 8192.0 * counts.pairs, 0.0, 0.0)


DENSE, EXPERTS = Layer(3e7), Layer(1e7)


def counts(start: int, length: int, samples: int = 0) -> StepCounts:
    return StepCounts(length, samples, start + length, causal_pairs(start, length), 0.0)


def learn(layers: list[tuple[int, int]], truth: tuple[float, ...], noise: float = 0.0, steps: int = 60) -> StageTimes:
    """The times of stages whose parts take `truth` times what is usual."""
    rng, times = random.Random(1), StageTimes(DENSE, EXPERTS, layers, USUAL)
    for step in range(steps):
        given = counts(step % 16 * 2048, rng.choice((512, 2048)))
        (dense, attention), (experts, _) = (layer_parts(work, given, USUAL) for work in (DENSE, EXPERTS))
        parts = [(d * dense, e * experts, (d + e) * attention) for d, e in layers]
        stage_s = {
            stage: float(sum(a * b for a, b in zip(part, truth, strict=True))) * (1 + rng.gauss(0, noise))
            for stage, part in enumerate(parts)
        }
        times.observe(given, stage_s)
    return times


def test_a_layer_is_its_attention_and_the_rest() -> None:
    given = counts(0, 100)
    rest, attention = layer_parts(DENSE, given, USUAL)
    assert rest == pytest.approx(1e-4 + 3e-3)
    assert attention == pytest.approx(8192e-12 * 5050)
    assert rest + attention == pytest.approx(DENSE.seconds(given, USUAL))
    assert len(USUAL) == len(UNITS)


@pytest.mark.parametrize("layers", [[(1, 5), (0, 6)], [(2, 1), (0, 3)], [(4, 0), (0, 8)], [(2, 2), (1, 3), (0, 4)]])
def test_each_kind_has_its_own_time(layers: list[tuple[int, int]]) -> None:
    truth = (2.0, 5.0, 1.2)
    times = learn(layers, truth)
    assert times.num_steps == 60 * len(layers)
    assert times.scales == pytest.approx(truth, rel=0.1)  # usual costs still count, for one layer of six most


def test_times_that_scatter() -> None:
    truth = (2.0, 5.0, 1.2)
    assert learn([(4, 0), (0, 8)], truth, noise=0.15, steps=200).scales == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize("is_restored", [False, True])
def test_one_stage_that_becomes_slower_is_learned_at_once(is_restored: bool) -> None:
    """Its steps take turns with those of the other stage, and are no late ones among them."""
    times = StageTimes(DENSE, EXPERTS, [(4, 0), (0, 8)], USUAL)
    for step in range(33):
        if step == 8 and is_restored:
            saved, times = times, StageTimes(DENSE, EXPERTS, [(4, 0), (0, 8)], USUAL)
            times.restore(saved.to_json())
        given = counts(step % 16 * 2048, 2048)
        (dense, attention), (experts, _) = (layer_parts(work, given, USUAL) for work in (DENSE, EXPERTS))
        slower = 2.0 if step >= 8 else 1.0
        times.observe(given, {0: 4 * float(dense + attention), 1: 8 * slower * float(experts + attention)})
    assert times.scales[1] > 1.8


def test_stages_alike_keep_the_usual_proportions() -> None:
    dense, experts, _ = learn([(2, 4), (2, 4)], (3.0, 3.0, 3.0)).scales
    assert dense == pytest.approx(experts, rel=0.05)
    assert dense == pytest.approx(3.0, rel=0.05)


def test_steps_with_the_output_head_do_not_count() -> None:
    times = StageTimes(DENSE, EXPERTS, [(1, 1), (0, 2)], USUAL)
    times.observe(counts(0, 2048, samples=1), {0: 1.0, 1: 1.0})
    assert (times.num_steps, times.scales) == (0, (1.0, 1.0, 1.0))
    times.observe(counts(0, 2048), {1: 1.0})
    assert times.num_steps == 1, "of a stage that has not answered nothing is known"


def test_what_was_learned_holds_for_any_split() -> None:
    times, truth = learn([(2, 1), (0, 3)], (2.0, 5.0, 1.2)), (2.0, 5.0, 1.2)
    later = StageTimes(DENSE, EXPERTS, [(1, 2), (1, 2)], USUAL)
    later.restore(json.loads(json.dumps(times.to_json())))
    assert later.num_steps == times.num_steps
    assert later.scales == pytest.approx(truth, rel=0.02)
    assert len(later.scales) == len(PARTS)


@pytest.mark.parametrize("learned", [None, [], {}, {"steps": 1, "gram": [[0.0]], "moment": [0.0]}, {"steps": -1}])
def test_anything_else_is_refused(learned: object) -> None:
    with pytest.raises(ValueError, match="it has"):
        StageTimes(DENSE, EXPERTS, [(1, 1), (0, 2)], USUAL).restore(learned)
