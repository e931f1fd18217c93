"""Steps the stages work on: who has answered, and which of them may be committed, in order. Pure Python, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.messages import CellReport, SampledToken, SequenceSlice, ShardSpec, StepPlan, StepResult


@dataclass(slots=True)
class Step:
    """A plan and what came back; `awaited` are the shards it cannot be committed without, as (stage, rank)."""

    plan: StepPlan
    awaited: set[tuple[int, int]]
    stage_s: dict[int, float] = field(default_factory=dict)  # of the slowest shard of every stage that has answered
    compute_us: int = 0  # of all shards
    estimate_us: int = 0
    samples: tuple[SampledToken, ...] = ()
    cells: list[CellReport] = field(default_factory=list)

    @property
    def slowest_s(self) -> float:
        """Seconds of the slowest shard, of those that have answered."""
        return max(self.stage_s.values(), default=0.0)

    def through_s(self, num_stages: int) -> float:
        """Seconds through all stages one after the other; those that have not answered count like the others."""
        return num_stages * sum(self.stage_s.values()) / max(1, len(self.stage_s))


class InFlight:
    """The steps between `send` and commit.

    A step is done with the answer of the shard that samples. With sparse cells it takes every shard's answer, as each
    reports its own layers and heads.
    """

    def __init__(self, shards: Sequence[ShardSpec], is_sparse: Callable[[SequenceSlice], bool]) -> None:
        self._all = {(shard.stage, shard.rank) for shard in shards}
        self._last = {(max(stage for stage, _ in self._all), 0)}
        self._is_sparse = is_sparse
        self._steps: dict[int, Step] = {}  # in the order of their numbers

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def plans(self) -> list[StepPlan]:
        """What the stages owe, the oldest first."""
        return [step.plan for step in self._steps.values()]

    def add(self, plan: StepPlan) -> None:
        awaited = self._all if any(map(self._is_sparse, plan.slices)) else self._last
        self._steps[plan.step] = Step(plan, set(awaited))

    def take(self, result: StepResult) -> list[Step]:
        """Take the answer of one shard; returns the steps to commit now. A late answer changes nothing."""
        step = self._steps.get(result.step)
        if step is None:
            return []
        step.stage_s[result.stage] = max(step.stage_s.get(result.stage, 0.0), result.compute_us / 1e6)
        step.compute_us += result.compute_us
        step.estimate_us += result.estimate_us
        step.samples += result.samples
        step.cells += result.cells
        step.awaited.discard((result.stage, result.rank))
        done = []
        while self._steps and not next(iter(self._steps.values())).awaited:
            done.append(self._steps.pop(next(iter(self._steps))))
        return done

    def clear(self) -> None:
        self._steps.clear()
