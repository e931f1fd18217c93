"""What was measured on a card decides what computes attention there: a table of card names, `cards.json`.

`python -m workers.bench gpu --cards FILE` writes it from the lines of its stage `tune`. On cards that it does not name,
and for head dims that it does not name, nothing is decided here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("cards.json")
OWN, CUDNN, FLASH, FLASH_ATTN = "own", "cudnn", "flash", "flash-attn"  # kernels of dense attention
LIBRARIES = (OWN, CUDNN, FLASH, FLASH_ATTN)

_forced: list[str] = []  # what `using` names; the last one counts


def dense_library(device: torch.device, dim: int) -> str | None:
    """Return which of `LIBRARIES` was the fastest for dense attention with heads of `dim`; None where unknown."""
    if _forced:
        return _forced[-1]
    name = _entry(device, dim).get("dense")
    return name if name in LIBRARIES else None


def tile_rates(device: torch.device, dim: int) -> dict[int, float]:
    """Return TFLOP/s of vertical-slash attention by rows of a tile; empty where unknown."""
    return {int(tile): float(rate) for tile, rate in _entry(device, dim).get("tile_tflops", {}).items()}


@contextmanager
def using(library: str) -> Iterator[None]:
    """Have `dense_library` name this one on every device, as benchmarks and checks do."""
    if library not in LIBRARIES:
        raise ValueError(f"library: {library!r}: must be one of {', '.join(LIBRARIES)}")
    _forced.append(library)
    try:
        yield
    finally:
        _forced.pop()


def _entry(device: torch.device, dim: int) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return _table().get(_name(device), {}).get(str(dim), {})


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
