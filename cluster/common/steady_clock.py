"""Time that passes evenly, whatever happens to the clock of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable


class SteadyClock:
    """Seconds since 1970 by the machine's clock when this was made, plus the seconds that have passed since.

    Whoever sets the clock of the machine, forwards or back, changes no deadline and no time to live of this process;
    the next process takes the machine's clock as it is then.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._monotonic = monotonic
        self._epoch = wall() - monotonic()  # when the monotonic clock was at 0

    def __call__(self) -> float:
        return self._epoch + self._monotonic()
