"""When every shard worked on every chunk of a prompt, from the traces that shards report (`cluster.trace_steps`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.engine.engine import Engine
from protos.stage.messages import ShardSpec, StepPlan, StepResult

_ARRIVE_WITHIN_S = 10.0  # after the first token: results of other shards of the last stage


@dataclass(frozen=True, slots=True)
class ChunkTime:
    """One chunk of a prompt on one shard; moments in seconds since the first shard began."""

    stage: int
    rank: int
    start: int  # first position
    length: int
    began_s: float  # the plan is at hand
    input_s: float  # the input is at hand
    ended_s: float
    sent_s: float
    sent_bytes: int
    reduce_s: float
    reduce_bytes: int

    @property
    def busy_s(self) -> float:
        return self.ended_s - self.input_s


class TraceLog:
    """Collects what an engine hears of the chunks of prompts; attached to it from the beginning to `close`."""

    def __init__(self, engine: Engine, shards: Sequence[ShardSpec]) -> None:
        self._engine = engine
        self._shards = len(shards)
        self._changed = threading.Condition()
        self._plans: dict[int, tuple[StepPlan, float]] = {}  # chunks, with the seconds of the slowest stage
        self._results: list[StepResult] = []
        engine.on_step = self._note_step
        engine.on_result = self._note_result

    def close(self) -> None:
        """Leave the engine."""
        self._engine.on_step = self._engine.on_result = None

    def clear(self) -> None:
        """Forget what has come so far."""
        with self._changed:
            self._plans.clear()
            self._results.clear()

    def chunks(self) -> list[tuple[StepPlan, float]]:
        """Return the plans that were chunks of one prompt, with the seconds of the slowest stage, in order."""
        with self._changed:
            return [self._plans[step] for step in sorted(self._plans)]

    def results(
        self, within_s: float = _ARRIVE_WITHIN_S, clock: Callable[[], float] = time.monotonic
    ) -> list[StepResult]:
        """Return the results of all shards for these chunks, or those that came within `within_s` seconds."""
        end = clock() + within_s
        with self._changed:
            while len(found := self._of_chunks()) < len(self._plans) * self._shards:
                if (left := end - clock()) <= 0:
                    break
                self._changed.wait(left)
            return found

    def _of_chunks(self) -> list[StepResult]:
        return [result for result in self._results if result.step in self._plans]

    def _note_step(self, plan: StepPlan, seconds: float) -> None:
        if len(plan.slices) == 1 and plan.num_tokens > 1:
            with self._changed:
                self._plans[plan.step] = plan, seconds
                self._changed.notify_all()

    def _note_result(self, result: StepResult) -> None:
        if result.trace is not None:
            with self._changed:
                self._results.append(result)
                self._changed.notify_all()


def chunk_times(plans: Iterable[StepPlan], results: Iterable[StepResult]) -> list[ChunkTime]:
    """Return the chunks of one prompt on every shard, by stage, rank and position; [] where nodes differ.

    Machines have monotonic clocks of their own: moments of several cannot be put beside each other.
    """
    parts = {plan.step: plan.slices[0] for plan in plans}
    traced = [(result, result.trace) for result in results if result.trace is not None and result.step in parts]
    if not traced or len({trace.node for _, trace in traced}) > 1:
        return []
    first = min(trace.began_us for _, trace in traced)
    found = []
    for result, trace in traced:
        moments = (trace.began_us, trace.input_us, trace.ended_us, trace.sent_us)
        began, came, ended, sent = (round((us - first) / 1e6, 6) for us in moments)
        part = parts[result.step]
        found.append(
            ChunkTime(
                result.stage, result.rank, part.start, part.length, began, came, ended, sent,
                trace.sent_bytes, trace.reduce_us / 1e6, trace.reduce_bytes,
            )
        )  # fmt: skip
    return sorted(found, key=lambda chunk: (chunk.stage, chunk.rank, chunk.start))


def as_json(chunks: Iterable[ChunkTime]) -> list[dict[str, Any]]:
    """Return chunks as plain data."""
    return [asdict(chunk) for chunk in chunks]


def from_json(rows: Iterable[Mapping[str, Any]]) -> list[ChunkTime]:
    """Return the chunks of `as_json`."""
    return [ChunkTime(**row) for row in rows]
