"""Memory of this process and everything it started, as proportional set size: shared pages are counted once."""

from __future__ import annotations

import threading

import psutil


def tree_pss_bytes() -> int:
    """Return the bytes of this process and all its descendants (Linux: PSS; elsewhere resident memory)."""
    total = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it ended meanwhile, or is not ours to look at
            continue
        total += getattr(memory, "pss", memory.rss)
    return total


class MemoryWatch:
    """Largest size seen while it is entered; it is sampled every `every_s` seconds."""

    def __init__(self, every_s: float = 5.0) -> None:
        self.peak_bytes = 0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_pss_bytes())
            if self._stop.wait(self._every_s):
                return
