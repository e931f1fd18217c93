"""The compiled attention kernel (workers/kernels/attention): one call executes a plan over paged KV.

It takes tensors in host memory: float32 and bfloat16 queries over float32, bfloat16 or int8 keys and values. The GIL is
released while it runs. The result of a row does not depend on the number of threads.

Legend: `T` rows, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from workers.attention.plan import AttentionPlan, Queries
from workers.kernels import abi
from workers.kernels.abi import AttentionArgs, Path
from workers.kernels.build import best_path, load
from workers.kv.paged import LayerKV, PageTable


def supports(q: torch.Tensor, kv: LayerKV) -> bool:
    """Return whether the kernel is built and takes queries `[T, H, D]` of this type and device over this cache."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and kv.keys.dtype in abi.TYPES
        and q.shape[-1] <= abi.MAX_HEAD_DIM
        and load().library is not None
    )


def attend(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor, *,
    visited: torch.Tensor | None = None, path: Path | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute attention of the rows of one plan; the contract is that of `attend.attend`.

    Args:
        scales: `[T]` float32, above 0.
        visited: `[H]` int64, filled with the number of pairs that every head visits.
        path: the best instruction set to use (default: that of `best_path`); a lower one where CPU or types need it.

    Raises:
        ValueError: shapes, types or strides do not fit each other, or the plan leaves the page table.
        MemoryError: there is no room for scratch memory (a few MiB per thread).
    """
    library = load().library
    if library is None:
        raise ValueError(f"attention kernel: not built ({load().reason}); use workers.attention.torch_backend")
    _check(q, kv, plan, scales)
    rows, heads, dim = q.intra.shape
    out = torch.empty(rows, heads, dim, dtype=q.intra.dtype)
    args = AttentionArgs(out=out.data_ptr(), keys=kv.keys.data_ptr(), values=kv.values.data_ptr())
    fill_args(args, kv, table, plan, scales, heads, kv.keys.shape[0], dim, out.dtype, path)
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
    kept_alive = _fill_selections(args, plan)
    status = library.longreach_attend(ctypes.byref(args))
    del kept_alive
    if status:
        abi.raise_for_status(
            status,
            no_memory=f"attention kernel: no memory for {torch.get_num_threads()} threads' scratch",
            invalid=f"attention kernel: rows {plan.start} to {plan.start + rows - 1} with {args.num_pages} pages of "
            f"{table.page_size} in {kv.keys.shape[1]} slots: out of range, or offsets or columns not ascending",
        )
    return out


def fill_args(
    args: AttentionArgs, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor, heads: int,
    kv_heads: int, dim: int, dtype: torch.dtype, path: Path | None = None,
) -> None:  # fmt: skip
    """Set the arguments that do not depend on the layer: the plan, its pages and scales, sizes and types."""
    args.pages, args.num_pages = table.page_slots.buffer_info()
    args.page_size, args.slots, args.scales = table.page_size, kv.keys.shape[1], scales.data_ptr()
    args.heads, args.kv_heads, args.dim = heads, kv_heads, dim
    args.start, args.length, args.distance, args.tile = plan.start, plan.length, plan.distance, plan.tile
    args.q_type, args.kv_type = abi.TYPES[dtype], abi.TYPES[kv.keys.dtype]
    args.threads, args.path = torch.get_num_threads(), best_path() if path is None else path


def _fill_selections(args: AttentionArgs, plan: AttentionPlan) -> list[object]:
    """Set the selections of the heads; returns the arrays that must outlive the call."""
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
