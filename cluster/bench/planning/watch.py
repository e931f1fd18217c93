"""What a measurement needs to know of the machine: peak memory of processes, and how busy others keep the cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import psutil

_EVERY_S = 0.05


class PeakMemory:
    """Samples the anonymous memory of processes in a thread; `peaks` has the largest value of each, in bytes.

    Pages of files (libraries, a checkpoint) do not count: the kernel drops them when it needs memory.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self.peaks = [0] * len(pids)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak memory", daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: TracebackType | type[BaseException] | BaseException | None) -> None:
        self._ended.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        for index, process in enumerate(self._processes):
            self.peaks[index] = max(self.peaks[index], anonymous_bytes(process))


def anonymous_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process that is no page of a file."""
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class OtherLoad:
    """Measures how many cores others keep busy between `start` and `cores`: all busy time less that of `pids`."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(), *map(psutil.Process, pids)]
        self.start()

    def start(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), _busy_s(), self._own_s()

    def cores(self) -> float:
        """Return the cores that others kept busy, on average, since `start`."""
        seconds = time.perf_counter() - self._began
        others = (_busy_s() - self._busy) - (self._own_s() - self._own)
        return max(0.0, round(others / max(seconds, 1e-9), 2))

    def _own_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return float(sum(each.user + each.system for each in times))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))
