"""The estimate in compiled code (workers/kernels/estimate).

It takes tensors in host memory: float32 and bfloat16 queries, and float32, bfloat16 and int8 keys. bfloat16 queries run
on AMX where the CPU has it (keys not in float32, head dim a multiple of 32), all else in vector code. It uses as many
threads as PyTorch does; results do not depend on their number.

Legend: `R` sampled rows, `G` query heads of a KV head, `S` keys the cell sees, `D` head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.plan import IntArray, Rotation, Selection
from workers.kernels import abi
from workers.kernels.abi import EstimateArgs, EstimateSelection, Path
from workers.kernels.build import best_path, load
from workers.kv.paged import LayerKV
from workers.sparse.estimate import CellKeys, SampledRows, Sums
from workers.sparse.selection import FloatArray


def supports(sample: SampledRows, kv: LayerKV) -> bool:
    """Return whether the library is built and takes these queries and this cache."""
    q = sample.queries.intra
    return (
        q.device.type == kv.keys.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and kv.keys.dtype in abi.TYPES
        and load().library is not None
    )


def sums(sample: SampledRows, keys: CellKeys, kv_head: int, path: Path | None = None) -> Sums:
    """See `EstimateBackend.sums`; `path` None is the best instruction set."""
    assert sample.rows[-1] - sample.rows[0] == len(sample.rows) - 1
    call = _Call(sample, keys, kv_head, path)
    columns, offsets = (np.empty((call.group, keys.stop), np.float32) for _ in range(2))
    lse = np.empty((call.group, len(sample.rows)), np.float32)
    call.run("longreach_estimate_sums", columns.ctypes, offsets.ctypes, lse.ctypes)
    return Sums(columns, offsets, lse)


def kept_share(
    sample: SampledRows, keys: CellKeys, kv_head: int, selections: Sequence[Selection], path: Path | None = None
) -> npt.NDArray[np.float64]:
    """See `EstimateBackend.kept_share`."""
    call = _Call(sample, keys, kv_head, path)
    share = np.empty(call.group)
    call.run("longreach_estimate_kept", call.selections(selections), share.ctypes)
    return share


def kept_mass(
    sample: SampledRows, keys: CellKeys, kv_head: int, sums: Sums, selections: Sequence[Selection | None],
    path: Path | None = None,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """See `EstimateBackend.kept_mass`."""
    assert sample.rows[-1] - sample.rows[0] == len(sample.rows) - 1
    call = _Call(sample, keys, kv_head, path)
    total = np.empty(call.group)
    arrays = [np.ascontiguousarray(one).ctypes for one in (sums.columns, sums.offsets, sums.lse)]
    call.run("longreach_estimate_mass", *arrays, call.selections(selections), total.ctypes)
    return total


def top_indices(scores: FloatArray, counts: Sequence[int], forced: int) -> list[IntArray]:
    """See `selection.top_indices`."""
    library = load().library
    assert library is not None
    scores = np.ascontiguousarray(scores, np.float32)
    rows, size = scores.shape
    sizes = np.clip(np.array(counts, np.int64), min(forced, size), size)
    picked = np.empty((rows, max(1, sizes.max(initial=1))), np.int32)
    shape = (rows, size, picked.shape[1], min(forced, size))
    threads = torch.get_num_threads()
    _raise_for(library.longreach_estimate_top(scores.ctypes, *shape, sizes.ctypes, picked.ctypes, threads))
    return [row[:count].copy() for row, count in zip(picked, sizes, strict=True)]


class _Call:
    """The arguments of one call, which keeps the arrays they point into alive."""

    def __init__(self, sample: SampledRows, keys: CellKeys, kv_head: int, path: Path | None) -> None:
        kv, plan = keys.kv, keys.plan
        heads, dim = sample.queries.intra.shape[1:]
        assert kv.keys.stride(2) == 1
        assert kv.keys.stride(1) == dim
        self.group = heads // kv.keys.shape[0]
        self._alive: list[object] = []
        dtype = sample.queries.intra.dtype
        args = self._args = EstimateArgs()
        ends = dict.fromkeys(Rotation, 0)
        for _, stop, rotation in plan.regions:
            args.q[rotation] = self._tensor(sample.queries.of(rotation))
            ends[rotation] = stop
        inter, succ = ends[Rotation.INTER], ends[Rotation.SUCC]
        args.borders[:] = [0, inter, max(inter, succ), keys.stop]
        args.scales = self._tensor(sample.scales.float())
        args.rows = self._array(np.array(sample.rows, np.int32) + np.int32(plan.start))
        args.keys = kv.keys.data_ptr()
        args.key_head = kv.keys.stride(0)
        if kv.key_scales is not None:
            assert kv.key_scales.stride(1) == 1
            args.key_scales = kv.key_scales.data_ptr()
            args.key_scale_head = kv.key_scales.stride(0)
        assert keys.stop <= keys.table.num_pages * keys.table.page_size
        args.page_size = keys.table.page_size
        args.pages, _ = keys.table.page_slots.buffer_info()
        args.num_rows, args.heads, args.kv_heads, args.dim = len(sample.rows), heads, kv.keys.shape[0], dim
        args.kv_head, args.q_type, args.kv_type = kv_head, abi.TYPES[dtype], abi.TYPES[kv.keys.dtype]
        args.threads = torch.get_num_threads()
        args.path = _path(dtype, kv.keys.dtype, dim) if path is None else path

    def selections(self, selections: Sequence[Selection | None]) -> ctypes.Array[EstimateSelection]:
        """Return the selections as structures; an empty one for None."""
        structures = (EstimateSelection * self.group)()
        for at, one in enumerate(selections):
            if one is not None:
                structures[at] = EstimateSelection(
                    self._array(one.offsets), self._array(one.columns), len(one.offsets), len(one.columns)
                )
        return structures

    def run(self, name: str, *rest: object) -> None:
        """Call an exported function with the common arguments and `rest`."""
        library = load().library
        assert library is not None
        _raise_for(getattr(library, name)(ctypes.byref(self._args), *rest))

    def _tensor(self, x: torch.Tensor) -> int:
        x = x.contiguous()
        self._alive.append(x)
        return x.data_ptr()

    def _array(self, x: IntArray) -> int:
        x = np.ascontiguousarray(x, np.int32)
        self._alive.append(x)
        return int(x.ctypes.data)


def _path(q: torch.dtype, cache: torch.dtype, dim: int) -> Path:
    best = best_path()
    assert best is not None
    tiles = q == torch.bfloat16 and cache != torch.float32 and dim % abi.DEPTH == 0
    return min(best, Path.AMX if tiles else Path.AVX512)


def _raise_for(status: int) -> None:
    abi.raise_for_status(status, no_memory="estimate: out of memory", invalid="estimate: invalid arguments")
