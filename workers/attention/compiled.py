"""The compiled attention kernel (workers/kernels/attention.cpp): one call executes a plan over paged KV.

It serves host memory: float32 and bfloat16 queries over float32, bfloat16 or int8 keys and values. The GIL is released
while it runs. The result of a row does not depend on the number of threads.

Legend: `T` rows, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Callable

import numpy as np
import torch

from workers.attention.plan import AttentionPlan
from workers.attention.queries import Queries
from workers.kernels.build import load
from workers.kv.paged import LayerKV, PageTable

MAX_HEAD_DIM = 1024
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_OUT_OF_MEMORY = 2


class Path(enum.IntEnum):
    """The instruction sets of the kernel, the best one last."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3


class Args(ctypes.Structure):
    """`Args` of workers/kernels/attention.h, field by field."""

    _fields_ = (
        ("q", ctypes.c_void_p * 3),
        ("q_row", ctypes.c_int64 * 3),
        ("q_head", ctypes.c_int64 * 3),
        ("out", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_head", ctypes.c_int64),
        ("value_head", ctypes.c_int64),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("key_scale_head", ctypes.c_int64),
        ("value_scale_head", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("num_pages", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("distance", ctypes.c_int64),
        ("tile", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("num_offsets", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("num_columns", ctypes.c_void_p),
        ("visited", ctypes.c_void_p),
        ("q_type", ctypes.c_int),
        ("kv_type", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("path", ctypes.c_int),
    )


@functools.cache
def _function() -> Callable[[object], int] | None:
    library = load().library
    if library is None:
        return None
    function = library.longreach_attend
    function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int
    return function


@functools.cache
def best_path() -> Path | None:
    """The path that calls take on this CPU; None where the kernel is not built."""
    library = load().library
    return None if library is None else Path(library.longreach_attention_path())


def available(q: torch.Tensor, kv: LayerKV) -> bool:
    """Whether the kernel is built and serves queries `[T, H, D]` of this type and place over this cache."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and kv.keys.dtype in _TYPES
        and q.shape[-1] <= MAX_HEAD_DIM
        and _function() is not None
    )


def attend(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor, *,
    visited: torch.Tensor | None = None, path: Path = Path.AMX,
) -> torch.Tensor:  # fmt: skip
    """Attention of the rows of one plan; the contract is that of `attend.attend`.

    Args:
        scales: `[T]` float32, above 0.
        visited: `[H]` int64, filled with `plan.visited_pairs` of every head.
        path: the best instruction set to use; a lower one is taken where the CPU or the types need it.

    Raises:
        ValueError: shapes, types or strides do not fit each other, or the plan leaves the page table.
        MemoryError: there is no room for scratch memory (a few MiB a thread).
    """
    function = _function()
    if function is None:
        raise ValueError(f"attention kernel: not built ({load().reason}); use workers.attention.torch_backend")
    _check(q, kv, plan, scales)
    rows, heads, dim = q.intra.shape
    out = torch.empty(rows, heads, dim, dtype=q.intra.dtype)
    args = Args(out=out.data_ptr(), keys=kv.keys.data_ptr(), values=kv.values.data_ptr())
    fill(args, kv, table, plan, scales, heads, kv.keys.shape[0], dim, out.dtype, path)
    args.key_head, args.value_head = kv.keys.stride(0), kv.values.stride(0)
    for i, tensor in enumerate((q.intra, q.succ, q.inter)):
        if tensor is not None:
            args.q[i], args.q_row[i], args.q_head[i] = tensor.data_ptr(), tensor.stride(0), tensor.stride(1)
    if kv.key_scales is not None and kv.value_scales is not None:
        args.key_scales, args.value_scales = kv.key_scales.data_ptr(), kv.value_scales.data_ptr()
        args.key_scale_head, args.value_scale_head = kv.key_scales.stride(0), kv.value_scales.stride(0)
    if visited is not None:
        if visited.shape != (heads,) or visited.dtype != torch.int64:
            raise ValueError(f"attention kernel: visited {tuple(visited.shape)} {visited.dtype}: need ({heads},) int64")
        args.visited = visited.data_ptr()
    kept_alive = _select(args, plan)
    status = function(ctypes.addressof(args))
    del kept_alive
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"attention kernel: no memory for {torch.get_num_threads()} threads' scratch")
    if status:
        raise ValueError(
            f"attention kernel: rows {plan.start} to {plan.start + rows - 1} with {args.num_pages} pages of "
            f"{table.page_size} in {kv.keys.shape[1]} slots: out of range, or offsets or columns not ascending"
        )
    return out


def fill(
    args: Args, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor, heads: int, kv_heads: int,
    dim: int, dtype: torch.dtype, path: Path = Path.AMX,
) -> None:  # fmt: skip
    """Set what does not depend on the layer: the plan, its pages and scales, sizes and types."""
    args.pages, args.num_pages = table.page_slots.buffer_info()
    args.page_size, args.slots, args.scales = table.page_size, kv.keys.shape[1], scales.data_ptr()
    args.heads, args.kv_heads, args.dim = heads, kv_heads, dim
    args.start, args.length, args.distance, args.tile = plan.start, plan.length, plan.distance, plan.tile
    args.q_type, args.kv_type = _TYPES[dtype], _TYPES[kv.keys.dtype]
    args.threads, args.path = torch.get_num_threads(), path


def _select(args: Args, plan: AttentionPlan) -> list[object]:
    """Hand the selections over; returns what must outlive the call."""
    if plan.heads is None:
        return []
    if len(plan.heads) != args.heads:
        raise ValueError(f"attention kernel: {len(plan.heads)} selections for {args.heads} query heads")
    offsets = [np.ascontiguousarray(head.offsets, np.int32) for head in plan.heads]
    columns = [np.ascontiguousarray(head.columns, np.int32) for head in plan.heads]
    tables = [
        np.array([array.ctypes.data for array in offsets], np.uintp), np.array([len(a) for a in offsets], np.int64),
        np.array([array.ctypes.data for array in columns], np.uintp), np.array([len(a) for a in columns], np.int64),
    ]  # fmt: skip
    args.offsets, args.num_offsets, args.columns, args.num_columns = (table.ctypes.data for table in tables)
    return [offsets, columns, tables]


def _check(q: Queries, kv: LayerKV, plan: AttentionPlan, scales: torch.Tensor) -> None:
    rows, heads, dim = q.intra.shape
    kv_heads = kv.keys.shape[0]
    for tensor in (q.intra, q.succ, q.inter):
        if tensor is not None and (tensor.shape != q.intra.shape or tensor.stride(2) != 1 or rows != plan.length):
            raise ValueError(
                f"attention kernel: queries {tuple(tensor.shape)} with strides {tensor.stride()}: need "
                f"{(plan.length, heads, dim)}, unit stride in the last dimension"
            )
    for tensor in (kv.keys, kv.values):
        if tensor.shape != (kv_heads, kv.keys.shape[1], dim) or tensor.stride()[1:] != (dim, 1) or heads % kv_heads:
            raise ValueError(
                f"attention kernel: cache {tuple(tensor.shape)} with strides {tensor.stride()}: need [K, slots, {dim}] "
                f"with rows one after the other, and K that divides {heads} query heads"
            )
    if scales.shape != (rows,) or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"attention kernel: scales {tuple(scales.shape)} {scales.dtype}: need ({rows},) float32")
    if kv.keys.dtype == torch.int8 and (kv.key_scales is None or kv.value_scales is None):
        raise ValueError("attention kernel: int8 keys and values need key_scales and value_scales")
