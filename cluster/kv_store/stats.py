"""What the KV store did since the head was started, for metrics and status."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class KvStats:
    """Counters; any thread may `add`."""

    found_blocks: int = 0  # by look-ups
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    stored_blocks: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    not_stored_blocks: int = 0  # their pages were used again before the disk was ready
    damaged_blocks: int = 0  # dropped because they are not what they should be
    evicted_blocks: int = 0  # for the quota, or because nobody used them for too long
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: float) -> None:
        """Raise counters by name."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def counters(self) -> dict[str, float]:
        """Return all counters by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if not item.name.startswith("_")}

    @property
    def load_rate(self) -> float:
        """Bytes a second of all loads so far, 0 before the first."""
        return self.loaded_bytes / self.load_s if self.load_s > 0 else 0.0
