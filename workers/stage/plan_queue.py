"""Plans of one run, between the stream that brings them and the thread that computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from protos.stage.messages import StepPlan


class UnreadablePlan(ValueError):
    """A message that is not a plan."""


class RunCancelled(Exception):
    """Whoever sends the plans does not want their results any more."""


class PlanQueue:
    """Reads plans on a thread of its own, so that the next one is at hand when a step ends."""

    def __init__(
        self, bursts: Iterable[Sequence[StepPlan]], on_late: Callable[[int], object] = lambda count: None
    ) -> None:
        """Args: `on_late` is called with the number of plans that came after `end`."""
        self._plans: deque[StepPlan] = deque()
        self._on_late = on_late
        self._ended = False
        self._error: UnreadablePlan | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._read, args=(bursts,), name="plans", daemon=True).start()

    def __iter__(self) -> Iterator[StepPlan]:
        """Yield the plans in order until the stream ends.

        Raises:
            UnreadablePlan: after the plans before it.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._plans or self._ended)
                if not self._plans:
                    break
                plan = self._plans.popleft()
            yield plan
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Drop the plans that were not taken, and those that still come."""
        with self._changed:
            self._ended = True
            self._plans.clear()
            self._changed.notify()

    def decodes_ahead(self, count: int) -> bool:
        """Return whether the next `count` plans are here already, and all of them decode."""
        with self._changed:
            ahead = list(islice(self._plans, count))
        return len(ahead) == count and all(plan.is_decode for plan in ahead)

    def _read(self, bursts: Iterable[Sequence[StepPlan]]) -> None:
        try:
            for burst in bursts:
                with self._changed:
                    if self._ended:
                        self._on_late(len(burst))
                        continue
                    self._plans.extend(burst)
                    self._changed.notify()
        except RunCancelled:
            self.end()
        except (ValueError, TypeError, KeyError) as error:
            self._error = UnreadablePlan(f"a plan cannot be read: {' '.join(str(error).split())}")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()
