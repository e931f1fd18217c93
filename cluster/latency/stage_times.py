"""What layers of each kind take, beside what the hardware table says of them: fitted to the times of all stages.

The costs of units of work cannot tell: dense layers and layers of experts share the units, and one stage is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.latency.fit import Costs, Sums, fit
from cluster.latency.step_work import UNITS, Floats, StepCounts, Work

PARTS = ("dense", "experts", "attention")  # layers of a kind without their attention, and that of all layers
_ATTENTION = [unit in ("kv_bytes", "attention_flops", "estimate_flops") for unit in UNITS]


def layer_parts(work: Work, counts: StepCounts, costs: Costs) -> tuple[float | Floats, float | Floats]:
    """Return the seconds of a step, or of many, without attention, and those of attention."""
    rest: float | Floats = 0.0
    attention: float | Floats = 0.0
    for units, cost, is_attention in zip(work.units(counts), costs, _ATTENTION, strict=True):
        if is_attention:
            attention = attention + units * cost
        else:
            rest = rest + units * cost
    return rest, attention


class StageTimes:
    """Fits how many times as long `PARTS` take as usual costs say, from chunks of prompts on every stage.

    Of interest for models with layers of both kinds in several stages, which have them in other proportions.
    """

    def __init__(self, dense: Work, experts: Work, layers: Sequence[tuple[int, int]], usual: Costs) -> None:
        """
        Args:
            dense, experts: one layer of each kind.
            layers: how many of them every stage has.
            usual: costs of units on such hardware.
        """
        self._works = dense, experts
        self._layers = layers
        self._usual = usual
        self._sums = Sums(len(PARTS), is_even=True)
        self._scales: Costs | None = None

    @property
    def num_steps(self) -> int:
        """Times of stages that were measured, in this run and in those that left a file."""
        return self._sums.steps

    @property
    def scales(self) -> tuple[float, ...]:
        """Measured over usual time of `PARTS`; ones before any step."""
        if not self.num_steps:
            return (1.0,) * len(PARTS)
        scales = self._scales
        if scales is None:
            scales = self._scales = fit((self._sums,), (1.0,) * len(PARTS))
        return scales

    def observe(self, counts: StepCounts, stage_s: Mapping[int, float]) -> None:
        """Take the seconds of stages in a step; one with the output head, which is no layer, does not count."""
        if counts.samples:
            return
        (dense, attention), (experts, _) = (layer_parts(work, counts, self._usual) for work in self._works)
        for stage, seconds in stage_s.items():
            num_dense, num_experts = self._layers[stage]
            x = (num_dense * float(dense), num_experts * float(experts), (num_dense + num_experts) * float(attention))
            expected = sum(a * b for a, b in zip(x, self.scales, strict=True)) if self.num_steps else seconds
            self._sums.add(x, seconds, expected)
            self._scales = None

    def to_json(self) -> dict[str, Any]:
        """Return what was learned, as plain data."""
        return self._sums.to_json()

    def restore(self, learned: object) -> None:
        """Begin with what another run has learned, with any split. Raises ValueError."""
        self._sums, self._scales = Sums.from_json(learned, len(PARTS), is_even=True), None
