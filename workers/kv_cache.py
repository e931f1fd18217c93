"""Paged KV: the storage of one shard, and the block tables that say which pages belong to which sequence.

Legend: `L` layers of the shard, `K` its KV heads, `D` head dim, `N` blocks, `P` page size in tokens.

Which block belongs to whom is decided by the head (`cluster.block_pool`); a `BlockTable` only repeats what the
plans said, and refuses a plan that does not continue it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class SlotRun(NamedTuple):
    """`length` tokens that lie one after the other in the cache, from slot `first`."""

    first: int
    length: int


class PlanMismatch(RuntimeError):
    """A step plan contradicts the block table this shard has seen so far."""


class BlockTable:
    """The pages of one sequence, kept as runs of neighbouring blocks, so that most contexts are one or two views."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_blocks = 0
        self._runs: list[SlotRun] = []

    def append(self, blocks: Sequence[int]) -> None:
        """Add block ids at the end of the table."""
        page = self.page_size
        for block in blocks:
            last = self._runs[-1] if self._runs else None
            if last is not None and last.first + last.length == block * page:
                self._runs[-1] = SlotRun(last.first, last.length + page)
            else:
                self._runs.append(SlotRun(block * page, page))
        self.num_blocks += len(blocks)

    def runs(self, start: int, stop: int) -> list[SlotRun]:
        """The slots of positions `start .. stop - 1`, in order."""
        if stop > self.num_blocks * self.page_size:
            raise PlanMismatch(f"position {stop - 1} lies beyond the {self.num_blocks} blocks of the table")
        found = []
        position = 0
        for first, length in self._runs:
            low, high = max(start, position), min(stop, position + length)
            if low < high:
                found.append(SlotRun(first + low - position, high - low))
            position += length
            if position >= stop:
                break
        return found


class PagedKV:
    """Keys and values of every layer of a shard.

    Memory is `[2, L, K, N * P, D]`: one KV head's pages lie together, so a run of neighbouring blocks is a plain
    `[tokens, D]` view and the attention kernel reads it without a copy.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, page_size: int, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}: the KV cache needs at least one block")
        self.page_size = page_size
        self.num_blocks = num_blocks
        self._data = torch.empty(
            2, layers, kv_heads, num_blocks * page_size, head_dim, dtype=dtype, device=device
        )

    def keys(self, layer: int) -> torch.Tensor:
        """`[K, N * P, D]` of a layer (index within the shard)."""
        return self._data[0, layer]

    def values(self, layer: int) -> torch.Tensor:
        """`[K, N * P, D]` of a layer (index within the shard)."""
        return self._data[1, layer]

    def write(self, layer: int, runs: Sequence[SlotRun], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `keys` and `values` `[T, K, D]` in the slots of `runs` (their lengths add up to `T`).

        Raises:
            PlanMismatch: a run lies outside the cache (slicing would cut it short without a word).
        """
        k_cache, v_cache = self._data[0, layer], self._data[1, layer]
        slots = k_cache.shape[1]
        row = 0
        for first, length in runs:
            if first + length > slots:
                raise PlanMismatch(f"slot {first + length - 1} of a plan lies outside the cache of {slots} slots")
            k_cache[:, first : first + length] = keys[row : row + length].transpose(0, 1)
            v_cache[:, first : first + length] = values[row : row + length].transpose(0, 1)
            row += length
        assert row == keys.shape[0]

    @staticmethod
    def block_bytes(layers: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
        """Bytes one block takes in a shard."""
        return 2 * layers * kv_heads * head_dim * page_size * dtype.itemsize
