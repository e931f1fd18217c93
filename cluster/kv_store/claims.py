"""Who is at work on a stored block: it is not written while it is dropped, nor dropped while it is written."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class KeyClaims:
    """Keys of blocks that somebody writes or drops. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[bytes] = set()

    def take(self, keys: Iterable[bytes]) -> set[bytes]:
        """Claim keys; returns those that nobody else has, which are to be given back."""
        with self._lock:
            free = set(keys) - self._taken
            self._taken |= free
            return free

    def give_back(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._taken.difference_update(keys)
