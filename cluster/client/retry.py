"""How often a client tries again, and how long it pauses in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff: `attempts` tries in all, the first pause up to `first_s`, doubling up to `largest_s`."""

    attempts: int = 5
    first_s: float = 0.1
    largest_s: float = 5.0

    def delays(self) -> Iterator[float]:
        """Yield the seconds to sleep between tries, each shortened at random by up to half so that clients spread."""
        for step in range(self.attempts - 1):
            yield min(self.largest_s, self.first_s * 2 ** min(step, 60)) * random.uniform(0.5, 1.0)


CALL_RETRIES = RetryPolicy()  # about 1 s: a caller without a head should hear so soon
REATTACH_RETRIES = RetryPolicy(attempts=14, first_s=0.2, largest_s=10.0)  # over 1 min: a head may be restarting
