"""The rows of blocks in the pages of a `PagedKV`, as numpy arrays, for threads beside the one that computes.

Such a thread may use no operation of torch that opens a parallel region (see `workers.stage.server`): numpy copies
without, and releases the GIL. On a device, copies go through a stream of their own.

Legend: `K` KV heads, `D` head dim, `P` page size, `T` tokens of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from workers.kv.block_file import Arrays
from workers.kv.paged import PagedKV

Rows = slice | npt.NDArray[np.int64]  # slots of a block: neighbouring ones as a slice, which needs no copy

_NUMPY_TYPES = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}  # of the same bits


class BlockPages:
    """Every layer of a cache in host memory, as arrays `[K, slots, D]` and `[K, slots]`.

    bfloat16 is int16 there, and fp8 uint8.
    """

    def __init__(self, kv: PagedKV, layers: int) -> None:
        self._page_size, self._num_pages = kv.page_size, kv.num_pages
        self._layers = [self._open(_tensors(kv, layer)) for layer in range(layers)]

    def rows(self, pages: Sequence[int], tokens: int) -> Rows:
        """Return the slots of the pages of a block of `tokens` tokens.

        Raises:
            ValueError: a page lies outside the cache or comes twice, or the tokens do not fill them.
        """
        size, ids = self._page_size, np.asarray(pages, np.int64)
        if tokens != len(ids) * size or not tokens:
            raise ValueError(f"{tokens} tokens do not fill {len(ids)} pages of {size}")
        if ids.min() < 0 or ids.max() >= self._num_pages or len(np.unique(ids)) != len(ids):
            raise ValueError(f"pages {ids.min()} to {ids.max()}: must be different ones below {self._num_pages}")
        if np.all(np.diff(ids) == 1):
            return slice(int(ids[0]) * size, int(ids[0]) * size + tokens)
        return (ids[:, None] * size + np.arange(size)).reshape(-1)

    def read(self, layer: int, head: int, rows: Rows) -> Arrays:
        """Return the rows of a layer and head (both counted within the shard), contiguous: views where they can be."""
        return tuple(array[head][rows] for array in self._layers[layer])

    def write(self, layer: int, head: int, rows: Rows, arrays: Arrays) -> None:
        """Copy arrays as of `read` to the rows of a layer and head."""
        for mine, array in zip(self._layers[layer], arrays, strict=True):
            mine[head][rows] = array

    def flush(self) -> None:
        """Return when everything written can be read by steps."""

    @staticmethod
    def _open(tensors: list[torch.Tensor]) -> list[Any]:
        return [tensor.numpy() for tensor in tensors]


class DevicePages(BlockPages):
    """The same of a cache on a device. Not run on a GPU yet; its copies are tested in host memory."""

    def __init__(self, kv: PagedKV, layers: int) -> None:
        super().__init__(kv, layers)
        self._device = kv.layer(0).keys.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def read(self, layer: int, head: int, rows: Rows) -> Arrays:
        with self._on_stream():
            at = self._index(rows)
            return tuple(tensor[head][at].cpu().numpy() for tensor in self._layers[layer])

    def write(self, layer: int, head: int, rows: Rows, arrays: Arrays) -> None:
        with self._on_stream():
            at = self._index(rows)
            for mine, array in zip(self._layers[layer], arrays, strict=True):
                mine[head][at] = torch.from_numpy(array.copy()).to(self._device)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    @staticmethod
    def _open(tensors: list[torch.Tensor]) -> list[Any]:
        return tensors

    def _index(self, rows: Rows) -> slice | torch.Tensor:
        return rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self._device)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # a thread's first device is GPU 0: going back to its stream would leave memory there
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield


def open_pages(kv: PagedKV, layers: int) -> BlockPages:
    """Return the access to a cache of this many layers."""
    return BlockPages(kv, layers) if kv.layer(0).keys.device.type == "cpu" else DevicePages(kv, layers)


def _tensors(kv: PagedKV, layer: int) -> list[torch.Tensor]:
    """Return keys, values and for 8-bit types their scales, as tensors of types that numpy knows."""
    cache = kv.layer(layer)
    tensors = [cache.keys, cache.values]
    if cache.key_scales is not None and cache.value_scales is not None:
        tensors += [cache.key_scales, cache.value_scales]
    return [tensor.view(_NUMPY_TYPES.get(tensor.dtype, tensor.dtype)) for tensor in tensors]
