"""The estimate in compiled code (workers/kernels/estimate).

It takes tensors in host memory: float32 and bfloat16 queries, and float32, bfloat16 and int8 keys. bfloat16 queries are
multiplied on AMX or in pairs (AVX-512 BF16) where the CPU has them, the keys are not in float32 and the head dim is a
multiple of 32; all else in float32. It uses as many threads as PyTorch does; results do not depend on their number.
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
from workers.kernels.build import best_path, exported
from workers.sparse.estimate import CellKeys, Estimate, SampledRows, Sums
from workers.sparse.selection import FloatArray


class CompiledEstimate(Estimate):
    """`Estimate`, whose sums and kept pairs are computed in compiled code; `path` None is the best instruction set."""

    def __init__(self, sample: SampledRows, keys: CellKeys, kv_head: int, path: Path | None = None) -> None:
        super().__init__(sample, keys, kv_head)
        kv, plan = keys.kv, keys.plan
        q = sample.queries.intra
        heads, dim = q.shape[1:]
        assert kv.keys.stride()[1:] == (dim, 1)
        assert kv.key_scales is None or kv.key_scales.stride(1) == 1
        assert keys.stop <= keys.table.num_pages * keys.table.page_size
        self._alive: list[torch.Tensor] = []  # the arrays that `_args` points into
        args = self._args = EstimateArgs()
        ends = dict.fromkeys(Rotation, 0)
        for _, stop, rotation in plan.regions:
            args.q[rotation] = self._tensor(sample.queries.of(rotation))
            ends[rotation] = stop
        inter, succ = ends[Rotation.INTER], ends[Rotation.SUCC]
        args.borders[:] = [0, inter, max(inter, succ), keys.stop]
        args.scales = self._tensor(sample.scales.float())
        args.rows = self._tensor(self._positions.to(torch.int32))
        args.keys, args.key_head = kv.keys.data_ptr(), kv.keys.stride(0)
        if kv.key_scales is not None:
            args.key_scales, args.key_scale_head = kv.key_scales.data_ptr(), kv.key_scales.stride(0)
        args.pages, _ = keys.table.page_slots.buffer_info()
        args.num_rows, args.heads, args.kv_heads, args.dim = len(sample.rows), heads, kv.keys.shape[0], dim
        args.page_size, args.kv_head = keys.table.page_size, kv_head
        args.q_type, args.kv_type = abi.TYPES[q.dtype], abi.TYPES[kv.keys.dtype]
        args.threads = torch.get_num_threads()
        args.path = _path(q.dtype, kv.keys.dtype, dim) if path is None else path

    def sums(self) -> Sums:
        rows = self.sample.rows
        assert rows[-1] - rows[0] == len(rows) - 1
        columns, offsets = (np.empty((self.group, self.keys.stop), np.float32) for _ in range(2))
        lse = np.empty((self.group, len(rows)), np.float32)
        _run("longreach_estimate_sums", self._args, columns.ctypes, offsets.ctypes, lse.ctypes)
        return Sums(columns, offsets, lse)

    def kept_share(self, selections: Sequence[Selection]) -> npt.NDArray[np.float64]:
        share = np.empty(self.group)
        structures, _kept_alive = _structures(selections)
        _run("longreach_estimate_kept", self._args, structures, share.ctypes)
        return share

    def kept_mass(self, sums: Sums, selections: Sequence[Selection | None]) -> npt.NDArray[np.float64]:
        total = np.empty(self.group)
        arrays = [np.ascontiguousarray(one).ctypes for one in (sums.columns, sums.offsets, sums.lse)]
        structures, _kept_alive = _structures(selections)
        _run("longreach_estimate_mass", self._args, *arrays, structures, total.ctypes)
        return total

    @staticmethod
    def top_indices(scores: FloatArray, counts: Sequence[int], forced: int) -> list[IntArray]:
        scores = np.ascontiguousarray(scores, np.float32)
        rows, size = scores.shape
        sizes = np.clip(np.array(counts, np.int64), min(forced, size), size)
        picked = np.empty((rows, max(1, sizes.max(initial=1))), np.int32)
        shape = (rows, size, picked.shape[1], min(forced, size))
        threads = torch.get_num_threads()
        _run("longreach_estimate_top", scores.ctypes, *shape, sizes.ctypes, picked.ctypes, threads)
        return [row[:count].copy() for row, count in zip(picked, sizes, strict=True)]

    def _tensor(self, x: torch.Tensor) -> int:
        """Return the address of `x`, made contiguous, which lives as long as this object."""
        x = x.contiguous()
        self._alive.append(x)
        return x.data_ptr()


def _structures(selections: Sequence[Selection | None]) -> tuple[ctypes.Array[EstimateSelection], list[IntArray]]:
    """Return the selections as structures, an empty one for None, and the arrays that must outlive the call."""
    structures, arrays = (EstimateSelection * len(selections))(), []
    for at, one in enumerate(selections):
        if one is not None:
            offsets, columns = np.ascontiguousarray(one.offsets, np.int32), np.ascontiguousarray(one.columns, np.int32)
            structures[at] = EstimateSelection(offsets.ctypes.data, columns.ctypes.data, len(offsets), len(columns))
            arrays += [offsets, columns]
    return structures, arrays


def _path(q: torch.dtype, cache: torch.dtype, dim: int) -> Path:
    best = best_path()
    assert best is not None
    is_bf16 = q == torch.bfloat16 and cache != torch.float32 and dim % abi.DEPTH == 0
    return min(best, Path.AMX if is_bf16 else Path.AVX512)


def _run(name: str, *arguments: object) -> None:
    status = exported(name)(*arguments)
    abi.raise_for_status(status, no_memory="estimate: out of memory", invalid="estimate: invalid arguments")
