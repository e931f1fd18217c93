"""Paged KV: the storage of one shard, and the page table of a sequence.

A page is `P` tokens of KV, the unit of allocation; a slot is one token's place in a page (slot = page * `P` + offset);
a run is a range of neighbouring slots. The scheduler's page pool decides which page belongs to which sequence; a
`PageTable` only records what the plans said.

Legend: `L` layers of the shard, `K` its KV heads, `D` head dim, `N` pages, `P` page size in tokens, `T` tokens, `S`
context length.
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from workers.kernels.device import moved
from workers.kv.host_memory import advise_huge_pages, commit_memory

_COMMITTED_BYTES = 1 << 30  # at the start, at most
_HUGE_PAGE = 2 << 20  # bytes
_LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}  # codes of 8-bit types
_HUGE_MIN_BYTES = 8 << 20  # of a head's slots; below, rounding up to whole huge pages would cost too much


class SlotRun(NamedTuple):
    """`length` neighbouring slots from slot `first`."""

    first: int
    length: int


class PlanMismatch(RuntimeError):
    """Raised when a step plan contradicts the page tables that this shard has seen so far."""


class PageTable:
    """The pages of one sequence, also kept as runs of slots, so that most contexts are one or two views."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.page_slots = array("i")  # first slot of every page, for the compiled kernels
        self._runs: list[SlotRun] = []
        self._device_slots: torch.Tensor | None = None

    def append(self, pages: Sequence[int]) -> None:
        """Append page ids."""
        page_size = self.page_size
        for page in pages:
            last = self._runs[-1] if self._runs else None
            if last is not None and last.first + last.length == page * page_size:
                self._runs[-1] = SlotRun(last.first, last.length + page_size)
            else:
                self._runs.append(SlotRun(page * page_size, page_size))
            self.page_slots.append(page * page_size)
        self.num_pages += len(pages)

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """Return the first slot of every page, `[pages]` int32, on a device; copied there when pages were appended."""
        known = self._device_slots
        if known is None or len(known) != self.num_pages or known.device != device:
            known = moved(torch.tensor(self.page_slots, dtype=torch.int32), device)
            self._device_slots = known
        return known

    def runs(self, start: int, stop: int) -> list[SlotRun]:
        """Return the slots of positions `start .. stop - 1` as runs, in order.

        Raises:
            PlanMismatch: a position lies beyond the pages.
        """
        if stop > self.num_pages * self.page_size:
            raise PlanMismatch(f"position {stop - 1} lies beyond the {self.num_pages} pages of the table")
        runs = []
        position = 0
        for first, length in self._runs:
            low, high = max(start, position), min(stop, position + length)
            if low < high:
                runs.append(SlotRun(first + low - position, high - low))
            position += length
            if position >= stop:
                break
        return runs

    def slots(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return the slot of every position `[n]`, which may be in any order.

        Raises:
            PlanMismatch: a position lies beyond the pages.
        """
        if len(positions) and int(positions.max()) >= self.num_pages * self.page_size:
            raise PlanMismatch(f"position {positions.max()} lies beyond the {self.num_pages} pages of the table")
        pages, within = np.divmod(positions, self.page_size)
        return np.asarray(np.frombuffer(self.page_slots, np.int32)[pages] + within, np.int64)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer of the cache: keys and values `[K, N * P, D]`, the rows of a head contiguous.

    8-bit keys and values have scales `[K, N * P]` in float32, one per token and head: `key = code * scale`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


class PagedKV:
    """Keys and values of every layer of a shard, in the model's type or as int8 or fp8 (e4m3) with scales.

    Memory is `[2, L, K, N * P, D]`: the pages of a KV head lie together, so that a run of slots is a plain `[n, D]`
    view, which the attention kernel reads without a copy.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_pages: int, page_size: int, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if num_pages < 1:
            raise ValueError(f"num_pages: {num_pages}: the KV cache needs at least one page")
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (2, layers, kv_heads, num_pages * page_size)
        try:
            self._data = _allocate(shape, head_dim, dtype, torch.device(device))
            self._scales = torch.empty(shape, dtype=torch.float32, device=device) if dtype in _LARGEST else None
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"kv_cache: {num_pages} pages of {page_size} tokens do not fit on {device}: lower kv_cache.bytes or "
                "kv_cache.fraction"
            ) from error

    @property
    def num_layers(self) -> int:
        """The layers of the shard."""
        return int(self._data.shape[1])

    def layer(self, index: int) -> LayerKV:
        """Return the cache of a layer; `index` counts within the shard."""
        keys, values = self._data[0, index], self._data[1, index]
        if self._scales is None:
            return LayerKV(keys, values)
        return LayerKV(keys, values, self._scales[0, index], self._scales[1, index])

    def commit(self, slots: int) -> None:
        """Have the system give memory under the first slots now, instead of when they are written to.

        What a virtual machine has not used yet may be slow to come, when somebody waits for stored KV. At most 1 GiB.
        """
        tensors = [self._data] if self._scales is None else [self._data, self._scales]
        row = sum(tensor[:, :, :, 0].nbytes for tensor in tensors)
        slots = min(slots, self.num_pages * self.page_size, _COMMITTED_BYTES // row)
        for tensor in tensors:
            for rows in tensor.view(-1, *tensor.shape[3:])[:, :slots]:
                commit_memory(rows)

    def write(self, layer: int, runs: Sequence[SlotRun], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `keys` and `values` `[T, K, D]` in the slots of `runs`, whose lengths add up to `T`.

        Raises:
            PlanMismatch: a run lies outside the cache, where slicing would silently truncate it.
        """
        assert sum(run.length for run in runs) == keys.shape[0]
        for side, rows in enumerate((keys, values)):
            if self._scales is None:
                _scatter(self._data[side, layer], runs, rows)
                continue
            quantised, scales = quantise(rows, self._data.dtype)
            _scatter(self._data[side, layer], runs, quantised)
            _scatter(self._scales[side, layer], runs, scales)


def _allocate(shape: tuple[int, int, int, int], dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `[2, L, K, slots, D]`, in host memory on huge pages where they pay: 32K tokens are read 8 % faster.

    The heads begin at different offsets within a huge page. Otherwise one token would be the first in a new huge page
    of every head, and would wait while the system clears dozens of them (0.2 s measured).
    """
    *heads, slots = shape
    row = dim * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or slots * row < _HUGE_MIN_BYTES:
        return torch.empty(*shape, dim, dtype=dtype, device=device)
    stagger = max(1, _HUGE_PAGE // math.prod(heads) // row) * row
    stride = -(-slots * row // _HUGE_PAGE) * _HUGE_PAGE + stagger  # bytes from a head to the next
    data = advise_huge_pages(torch.empty(*heads, -(-stride // row), dim, dtype=dtype, device=device))
    return data[..., :slots, :]


def quantise(rows: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `[..., D]` as 8-bit codes and their scales `[...]` in float32.

    Symmetric: the largest value of a row is 127 in int8, and 448 in fp8 (e4m3). A row that is not finite gets a scale
    that is not finite either, so that the damage stays visible.
    """
    wide = rows.float()
    scales = wide.abs().amax(dim=-1) / _LARGEST[dtype]
    steps = wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return (steps.round_() if dtype == torch.int8 else steps).to(dtype), scales


def _scatter(cache: torch.Tensor, runs: Sequence[SlotRun], rows: torch.Tensor) -> None:
    """Copy rows `[T, K, ...]` to the slots of `cache` `[K, slots, ...]`."""
    slots = cache.shape[1]
    row = 0
    for first, length in runs:
        if first + length > slots:
            raise PlanMismatch(f"slot {first + length - 1} of a plan lies outside the cache of {slots} slots")
        cache[:, first : first + length] = rows[row : row + length].transpose(0, 1)
        row += length
