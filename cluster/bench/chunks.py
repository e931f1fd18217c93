"""Start, end and duration of the prefill chunks of long prompts."""

from __future__ import annotations

import statistics
import time

from protos.stage.messages import StepPlan


class Chunks:
    """Records the steps that have a chunk of one long prompt only; `around` gives their duration at a moment."""

    def __init__(self, longer_than: int) -> None:
        """Ignore steps of at most `longer_than` tokens, which are not chunks of a long prompt."""
        self._longer_than = longer_than
        self._ended: list[float] = []
        self.seconds: list[float] = []

    def note(self, plan: StepPlan, seconds: float, now: float | None = None) -> None:
        """Record a step that has just ended, if it is such a chunk."""
        if len(plan.slices) == 1 and plan.num_tokens > self._longer_than:
            self._ended.append(time.perf_counter() if now is None else now)
            self.seconds.append(seconds)

    def around(self, start: float, stop: float) -> float:
        """Return the median seconds of the chunks between two moments, with the last one before and the first after."""
        first = sum(ended < start for ended in self._ended)
        last = sum(ended - took < stop for ended, took in zip(self._ended, self.seconds, strict=True))
        return statistics.median(self.seconds[max(0, first - 1) : last + 1])
