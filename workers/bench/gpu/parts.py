"""Where the time of a step goes: functions are wrapped so that events around their calls are recorded on the device.

Nothing waits for the device until the sums are read. A function inside another one of the list counts with that one.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_SPARSE = "workers.kernels.triton.sparse."


class Part(NamedTuple):
    """A function by the module in which callers look it up, and the part of a step whose time it is."""

    part: str
    module: str
    name: str


STEP = (
    Part("attention", "workers.attention.cuda", "attend_dense"),
    Part("attention", "workers.attention.cuda", "attend_lists"),
    Part("attention", "workers.model.device.step", "attend_decoding"),
    Part("staging", "workers.attention.cuda", "stage"),
    Part("estimate", _SPARSE + "estimate", "estimate"),
    Part("selection", _SPARSE + "selection", "thresholds"),
    Part("selection", _SPARSE + "selection", "compact"),
    Part("selection", _SPARSE + "device_lists", "make_lists"),
    Part("recall", _SPARSE + "recall", "held_out_shares"),
    Part("recall", _SPARSE + "recall", "overlap"),
    Part("experts", "workers.model.decoder", "route"),
    Part("experts", "workers.model.decoder", "run_experts"),
    Part("heads", "workers.model.device.step", "store_heads"),
    Part("norms", "workers.model.decoder", "add_rms_norm"),
)
LISTS = (  # of `attend_lists`
    Part("kernel", "workers.kernels.triton.sparse_attention", "sparse_attention"),
    Part("dense heads", "workers.kernels.triton.dense_attention", "dense_attention"),
    Part("entries", "workers.kernels.triton.entries", "fill_entries"),
    Part("columns", "workers.kernels.triton.staging", "gather_columns"),
)


class Recorder:
    """Collects the seconds that the device spends in the functions of a list, by part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._depth = 0
        self.missing: list[str] = []  # functions that this build does not have

    @contextmanager
    def recording(self, parts: tuple[Part, ...]) -> Iterator[None]:
        """Record while the context is open."""
        replaced: list[tuple[Any, str, Any]] = []
        try:
            for part in parts:
                module = importlib.import_module(part.module)
                original = getattr(module, part.name, None)
                if original is None:
                    self.missing.append(f"{part.module}.{part.name}")
                    continue
                setattr(module, part.name, self.wrapped(part.part, original))
                replaced.append((module, part.name, original))
            yield
        finally:
            for module, name, original in reversed(replaced):
                setattr(module, name, original)

    def seconds(self) -> dict[str, float]:
        """Wait for the device; return the seconds of every part since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = {}
        for part, start, stop in self._spans:
            spent = start.elapsed_time(stop) / 1e3 if self._device.type == "cuda" else stop - start
            found[part] = found.get(part, 0.0) + spent
        self._spans.clear()
        return found

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls recorded as a part."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if self._depth:
                return function(*arguments, **options)
            self._depth += 1
            start = self._mark()
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                self._spans.append((part, start, self._mark()))

        return call

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def count_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels and copies a call puts on the GPU, by PyTorch's profiler; None without a GPU."""
    if device.type != "cuda":
        call()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in profiled.events())
