"""When the chunks of long prefills ran, and how long each took."""

from __future__ import annotations

import statistics
import time

from protos.stage.messages import StepPlan


class Chunks:
    """Collects steps of one long prompt alone: `around` answers how long a chunk took at a moment."""

    def __init__(self, longer_than: int) -> None:
        """Args: steps of at most `longer_than` tokens are not chunks of a long prompt."""
        self._longer_than = longer_than
        self._ended: list[float] = []
        self.seconds: list[float] = []

    def note(self, plan: StepPlan, seconds: float, now: float | None = None) -> None:
        """Take a step that has just ended."""
        if len(plan.slices) == 1 and plan.num_tokens > self._longer_than:
            self._ended.append(time.perf_counter() if now is None else now)
            self.seconds.append(seconds)

    def around(self, start: float, stop: float) -> float:
        """Median seconds of the chunks that ran between two moments, with the last one before and the first after."""
        first = sum(ended < start for ended in self._ended)
        last = sum(ended - took < stop for ended, took in zip(self._ended, self.seconds, strict=True))
        return statistics.median(self.seconds[max(0, first - 1) : last + 1])
