"""Plans of one run, between the stream that brings them and the thread that computes."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from protos.stage.messages import StepPlan


class UnreadablePlan(ValueError):
    """A message that is not a plan."""


class PlanQueue:
    """Takes plans off the wire by a thread of its own, so that the next one is at hand when a step ends."""

    def __init__(self, bursts: Iterable[Sequence[StepPlan]]) -> None:
        self._arrived: queue.SimpleQueue[Sequence[StepPlan] | UnreadablePlan | None] = queue.SimpleQueue()
        self._waiting: deque[StepPlan | UnreadablePlan | None] = deque()
        threading.Thread(target=self._take, args=(bursts,), name="plans", daemon=True).start()

    def __iter__(self) -> Iterator[StepPlan]:
        """The plans in order, until the stream ends. Raises UnreadablePlan."""
        while True:
            if not self._waiting:
                self._add(self._arrived.get())
                continue
            plan = self._waiting.popleft()
            if plan is None:
                return
            if isinstance(plan, UnreadablePlan):
                raise plan
            yield plan

    def decodes_ahead(self, count: int) -> bool:
        """Whether the next `count` plans are here already, and all of them decode."""
        while not self._arrived.empty():
            self._add(self._arrived.get())
        ahead = [self._waiting[index] for index in range(min(count, len(self._waiting)))]
        return len(ahead) == count and all(isinstance(plan, StepPlan) and plan.decodes for plan in ahead)

    def _add(self, burst: Sequence[StepPlan] | UnreadablePlan | None) -> None:
        self._waiting.extend([burst] if burst is None or isinstance(burst, UnreadablePlan) else burst)

    def _take(self, bursts: Iterable[Sequence[StepPlan]]) -> None:
        try:
            for burst in bursts:
                self._arrived.put(burst)
        except (ValueError, TypeError, KeyError) as error:
            self._arrived.put(UnreadablePlan(f"a plan cannot be read: {' '.join(str(error).split())}"))
        finally:
            self._arrived.put(None)
