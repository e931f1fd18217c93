"""Steps sent to the stages and not yet committed: which shards have answered, and what may be committed, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.stage.messages import CellReport, SampledToken, SequenceSlice, ShardSpec, StepPlan, StepResult


@dataclass(slots=True)
class InFlightStep:
    """A plan with the results so far; `awaited` are the shards, as (stage, rank), that a commit still needs."""

    plan: StepPlan
    awaited: set[tuple[int, int]]
    stage_s: dict[int, float] = field(default_factory=dict)  # seconds of the slowest shard so far, by stage
    compute_us: int = 0  # of all shards
    estimate_us: int = 0  # the part of it that selected keys
    samples: tuple[SampledToken, ...] = ()
    targets: tuple[SampledToken, ...] = ()
    cells: list[CellReport] = field(default_factory=list)

    @property
    def slowest_s(self) -> float:
        """Seconds of the slowest shard that has answered."""
        return max(self.stage_s.values(), default=0.0)


class InFlightSteps:
    """The steps between send and commit, in order.

    A step is complete with the result of the shard that samples; one with sparse cells needs the result of every shard,
    as each reports its own layers and heads. Other shards send the results of decode steps much later; their compute
    time is added to the next step that completes.
    """

    def __init__(self, shards: Sequence[ShardSpec], is_sparse: Callable[[SequenceSlice], bool]) -> None:
        self._all = {(shard.stage, shard.rank) for shard in shards}
        self._last = {(max(stage for stage, _ in self._all), 0)}
        self._is_sparse = is_sparse
        self._steps: dict[int, InFlightStep] = {}  # in the order of their numbers
        self._decode_s: dict[tuple[int, int], float] = {}  # of the newest decode step of each shard
        self._late_us = 0  # compute time of late results

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def plans(self) -> list[StepPlan]:
        """Plans in flight, the oldest first."""
        return [step.plan for step in self._steps.values()]

    def add(self, plan: StepPlan) -> None:
        awaited = self._all if any(map(self._is_sparse, plan.slices)) else self._last
        self._steps[plan.step] = InFlightStep(plan, set(awaited))

    def take(self, result: StepResult) -> list[InFlightStep]:
        """Take the result of one shard; returns the steps that are complete with it, in order."""
        step = self._steps.get(result.step)
        if step is None or step.plan.is_decode:
            self._decode_s[result.stage, result.rank] = result.compute_us / 1e6
        if step is None:
            self._late_us += result.compute_us
            return []
        step.stage_s[result.stage] = max(step.stage_s.get(result.stage, 0.0), result.compute_us / 1e6)
        step.compute_us += result.compute_us + self._late_us
        self._late_us = 0
        step.estimate_us += result.estimate_us
        step.samples += result.samples
        step.targets += result.targets
        step.cells += result.cells
        step.awaited.discard((result.stage, result.rank))
        done = []
        while self._steps and not next(iter(self._steps.values())).awaited:
            done.append(self._steps.pop(next(iter(self._steps))))
        return done

    def decode_s(self, num_stages: int) -> float:
        """Return the seconds of a decode step through all stages; one without a result counts as the mean of others."""
        slowest: dict[int, float] = {}
        for (stage, _), seconds in self._decode_s.items():
            slowest[stage] = max(slowest.get(stage, 0.0), seconds)
        return num_stages * sum(slowest.values()) / max(1, len(slowest))

    def clear(self) -> None:
        self._steps.clear()
        self._decode_s.clear()
        self._late_us = 0
