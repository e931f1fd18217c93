"""Timing of a function on CPU or CUDA, and the figures of a result file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number: `value` is the median of `repeats` runs, `low` and `high` are the extremes."""

    name: str
    value: float
    unit: str
    repeats: int = 1
    low: float | None = None
    high: float | None = None
    note: str = ""

    def line(self) -> str:
        """Return the figure as one line of text."""
        spread = f"  ({self.low:.4g} .. {self.high:.4g})" if self.low is not None and self.high is not None else ""
        return f"{self.name:<58} {self.value:>10.4g} {self.unit}{spread}{'  ' + self.note if self.note else ''}"


def median_figure(name: str, values: list[float], unit: str, note: str = "") -> Figure:
    """Return the figure of several runs."""
    return Figure(name, statistics.median(values), unit, len(values), min(values), max(values), note)


def measure(call: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 2) -> list[float]:
    """Return the seconds of each of `repeats` calls after `warm_up` unmeasured ones; by CUDA events on a GPU."""
    for _ in range(warm_up):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return seconds
