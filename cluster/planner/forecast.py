"""Predicted time of a prefill and of a decode step, from the cost of the units of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.config.deployment import Deployment
from cluster.latency.measured import Costs
from cluster.latency.model import counts_of
from cluster.latency.pipeline_work import prompt_steps, stage_works
from cluster.latency.step_work import StepCounts
from cluster.planner.memory import activation_width

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds to the first token of a prompt that is alone, and of a decode step at its end."""

    prefill_s: float
    decode_s: float


def predict(deployment: Deployment, context: int, costs: Costs) -> Forecast:
    """Return the times of one prompt of `context` tokens, alone, in steps of its deployment."""
    spec, works = deployment.spec, stage_works(deployment)
    steps = prompt_steps(deployment, context)
    counts = counts_of(spec, steps, costs.keys)
    seconds = [np.asarray(work.seconds(counts, costs.seconds)) for work in works]
    hidden = spec.hidden_size * activation_width(deployment)
    hops = costs.hop_s + np.asarray(counts.tokens) * hidden * costs.link_s
    decode = StepCounts(1.0, 1.0, float(context), float(context), 0.0)
    decode_s = sum(float(work.seconds(decode, costs.seconds)) for work in works) + len(works) * costs.hop_s
    return Forecast(last_finish(seconds, hops), decode_s)


def last_finish(seconds: Sequence[Floats], hops: Floats) -> float:
    """Return when the last stage has finished the last step; `seconds[stage][step]`, `hops[step]` between stages.

    A stage begins a step when it has finished the one before, and the stage before it has sent this one.
    """
    arrived = np.zeros(len(hops))
    for number, times in enumerate(seconds):
        finished, free = np.empty(len(hops)), 0.0
        for step, (ready, took) in enumerate(zip(arrived, times, strict=True)):
            free = max(free, ready) + took
            finished[step] = free
        arrived = finished + hops * (number + 1 < len(seconds))
    return float(arrived[-1])
