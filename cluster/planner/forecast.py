"""Predicted time of a prefill and of a decode step, from the cost of the units of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.config.deployment import Deployment
from cluster.latency.model import chunk_counts
from cluster.latency.pipeline_work import prompt_steps, stage_works
from cluster.latency.sparsity import budget_keys
from cluster.latency.step_work import StepCounts
from cluster.planner.memory import activation_width
from cluster.scheduler.chunking import Chunk
from protos.model.spec import ModelSpec

Floats = NDArray[np.float64]
KeysOf = Callable[[Floats], Floats]  # keys that sparse rows visit, by their mean context


@dataclass(frozen=True, slots=True)
class Costs:
    """What a forecast stands on: seconds of each unit of `step_work.UNITS`, and where they come from."""

    seconds: tuple[float, ...]
    source: str
    link_s: float = 0.0  # of one byte to the next stage
    hop_s: float = 0.0  # of a message to the next stage, and of what the head does between steps
    keys: KeysOf | None = None  # measured; None: what the budgets say
    is_rough: bool = False  # they are assumed, not measured


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


def counts_of(spec: ModelSpec, steps: Sequence[Chunk], keys: KeysOf | None) -> StepCounts:
    """Return the counts of steps of one chunk each, of which the last is sampled."""
    counts = chunk_counts(steps, keys or (lambda contexts: budget_keys(spec, contexts)))
    samples = np.zeros(len(steps))
    samples[-1] = 1.0
    return counts._replace(samples=samples)


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
