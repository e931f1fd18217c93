"""What every case gets: the device, the sizes, a clock, and a place to write to.

In a rehearsal sizes are tiny, kernels are interpreted on the CPU, and no time or rate is written: those are null.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.bench.gpu.journal import Journal, Line
from workers.bench.timing import measure

_SPENT_S = 0.7  # on the repeats of one figure, about
_REPEATS = 3, 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the kernels: those of Qwen3-30B-A3B, one cell or one step of it."""

    heads: int = 32
    kv_heads: int = 4
    dims: tuple[int, ...] = (128, 64)  # the first is the model's
    hidden: int = 2048
    experts: int = 128
    top_k: int = 8
    inter: int = 768
    vocab: int = 151_936
    cell: int = 8192  # rows of attention
    step: int = 32_768  # rows of everything else
    short: int = 65_536  # keys
    middle: int = 131_072
    long: int = 1 << 20
    page: int = 64
    near: int = 16_384  # offsets next to a row in the first pattern
    offsets: int = 16_384 + 28 * 256
    columns: int = 17_408
    last_q: int = 64
    matmul: int = 8192
    copied: int = 4 << 30  # bytes


TINY = Sizes(
    heads=2, kv_heads=1, dims=(16,), hidden=32, experts=4, top_k=2, inter=16, vocab=97, cell=32, step=24, short=96,
    middle=160, long=224, page=16, near=32, offsets=88, columns=24, last_q=17, matmul=32, copied=4096,
)  # fmt: skip


@dataclass(slots=True)
class Context:
    """The device, sizes and remaining time of a call; `kept` holds what cases share, such as weights."""

    journal: Journal
    device: torch.device
    deadline: float  # of time.monotonic()
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        """Whether nothing is measured."""
        return self.journal.rehearsal

    @property
    def sizes(self) -> Sizes:
        """The sizes of the kernels."""
        return TINY if self.rehearsal else Sizes()

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations; the interpreter multiplies no bfloat16."""
        return torch.float32 if self.rehearsal else torch.bfloat16

    def left(self) -> float:
        """Return the seconds until the call must end."""
        return self.deadline - time.monotonic()

    def random(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 1) -> torch.Tensor:
        """Return normal random values made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Return memory that nothing uses any more to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def time(
        self, call: Callable[[], object], flop: float = 0.0, moved: float = 0.0, captured: bool = False
    ) -> Line:  # fmt: skip
        """Measure a call, after one that compiles: milliseconds, and the rates that follow from its work.

        Args:
            flop: floating point operations of a call.
            moved: bytes that it reads and writes.
            captured: replay a CUDA graph of it, as launches from the host would take longer than the kernels.

        Returns:
            `ms` (median), `low`, `high`, `repeats`, and `tflops` or `gbs` with their shares of this card's ceilings.
        """
        call()
        self.synchronize()
        if self.rehearsal:
            return self.rates([], flop, moved)
        if captured and self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            call = graph.replay
            call()
            self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        once = time.perf_counter() - began
        low, high = _REPEATS
        repeats = min(high, max(low, int(_SPENT_S / max(once, 1e-6))))
        return self.rates(measure(call, self.device, repeats, warm_up=0), flop, moved)

    def rates(self, seconds: list[float], flop: float = 0.0, moved: float = 0.0) -> Line:
        """Return the figures of measured seconds, as `time` does; null in a rehearsal."""
        names = (
            ["ms", "low", "high"] + (["tflops", "of_matmul"] if flop else []) + (["gbs", "of_copy"] if moved else [])
        )
        if self.rehearsal or not seconds:
            return dict.fromkeys(names) | {"repeats": len(seconds)}
        middle = statistics.median(seconds)
        found: Line = {"ms": middle * 1e3, "low": min(seconds) * 1e3, "high": max(seconds) * 1e3}
        if flop:
            found["tflops"] = flop / middle / 1e12
            found["of_matmul"] = _share(found["tflops"], self.ceiling("matmul", "tflops"))
        if moved:
            found["gbs"] = moved / middle / 1e9
            found["of_copy"] = _share(found["gbs"], self.ceiling("copy", "gbs"))
        return {name: _short(found[name]) for name in names} | {"repeats": len(seconds)}

    def ceiling(self, case: str, name: str) -> float | None:
        """Return a ceiling of this card, which stage `env` measured; None before that."""
        line = self.journal.newest("env", case)
        return None if line is None else line.get(name)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the file: `run` returns its figures, and may yield parts of them before.

    `limit_s` are the seconds after which it is taken to hang; it is not begun if fewer than `needs_s` are left.
    """

    stage: str
    name: str
    run: Callable[[Context], Line | Iterator[Line]]
    needs_s: float = 10.0
    limit_s: float = 120.0


def _share(value: float, of: float | None) -> float | None:
    return None if not of else value / of


def _short(value: float | None) -> float | None:
    """Return a number with the digits that mean something."""
    return None if value is None else float(f"{value:.5g}")
