"""All launches that a step of a model makes on a GPU, with the heads and sizes of Qwen3-30B-A3B.

They are the calls of the step itself, on few rows and keys: lengths decide nothing of what is compiled. Large tensors
are on the device `meta`, small ones in host memory.

Legend: `T` rows, `H` query heads, `K` KV heads, `D` head dim, `M` hidden size, `I` expert intermediate, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from protos.model.spec import HeadBudget, SparseSpec
from workers.attention import cuda, torch_backend
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.builds.limits import Limits, Shipped
from workers.kv.paged import LayerKV, PageTable
from workers.sparse.cuda import HeadBudgets, SparseCell, StepSelection
from workers.sparse.selection import synthetic_selection

HEADS, KV_HEADS, DIM, PAGE = 32, 4, 128, 64
START, ROWS, DISTANCE = 1216, 256, 600  # rows with keys in all three regions
E4M3 = 89  # compute capability from which the type exists
CACHES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

_PREFILL = Limits(units="own")
ATTENTION = {
    "stage_kernel": Limits(registers=64),
    "gather_columns_kernel": Limits(registers=128),
    "entries_kernel": Limits(registers=128),
    "dense_attention_kernel": _PREFILL,
    "sparse_attention_kernel": _PREFILL,
}
JOINED = {"merge_parts_kernel": Limits(registers=128)}
SELECTION = {
    "lse_kernel": Limits(units="own", copies=1, shuffles=36),
    # a tile of 128 x 64 probabilities takes at most 24 shuffles a thread, those between items included
    "sums_kernel": Limits(units="own", shuffles=24),
    "held_out_kernel": Limits(units="own", shuffles=36),
    "overlap_kernel": Limits(units="own"),
    "lists_kernel": Limits(registers=128),
}


def shipped() -> Iterator[Shipped]:
    """Yield the launches of attention, of selection, and of the other parts of a layer."""
    from workers.bench.builds.shipped_layer import shipped_layer
    from workers.bench.builds.shipped_quant import shipped_quant

    yield from _attention()
    for name, spec in (
        ("fixed budgets", SparseSpec(uniform=HeadBudget(1000, 6096))),
        ("adaptive budgets", SparseSpec()),
        ("synthetic selection", SparseSpec(synthetic=True)),
    ):
        yield Shipped(f"selection, {name}", partial(_select, spec), SELECTION)
    yield from shipped_layer()
    yield from shipped_quant()


def paged(dim: int, cache: torch.dtype, device: str = "cpu") -> tuple[LayerKV, PageTable]:
    """Return a layer of cache and the pages of a sequence of `START + ROWS` tokens, in no run."""
    pages = -(-(START + ROWS) // PAGE)
    table = PageTable(PAGE)
    table.append(range(pages)[::-1])
    sides = torch.zeros(2, KV_HEADS, pages * PAGE, dim, dtype=cache, device=device)
    if cache == torch.bfloat16:
        return LayerKV(*sides), table
    return LayerKV(*sides, *torch.ones(2, KV_HEADS, pages * PAGE, device=device)), table


def _attention() -> Iterator[Shipped]:
    for dim in (64, DIM):
        for name, cache in CACHES.items():
            if dim == DIM or name == "bf16":
                call, least = partial(_attend, dim, cache), E4M3 if name == "fp8" else 80
                yield Shipped(f"prefill, heads of {dim}, {name} KV", call, ATTENTION, least)
        yield Shipped(f"parts of libraries, heads of {dim}", partial(_join, dim), JOINED)


def _attend(dim: int, cache: torch.dtype, capability: int) -> None:
    """Launch dense and sparse attention of rows whose keys lie in all regions."""
    kv, table = paged(dim, cache)
    rows = torch.zeros(ROWS, HEADS, dim, dtype=torch.bfloat16)
    queries, scales = Queries(rows, rows.clone(), rows.clone()), torch.linspace(1.0, 2.0, ROWS)
    plan = AttentionPlan(START, ROWS, DISTANCE)
    heads = tuple(synthetic_selection(START + ROWS, (START, 0, head)) for head in range(HEADS))
    with _targets(capability):
        each = cuda.RowScales.of(scales, scales.device)
        cuda.attend_dense(queries, cuda.stage(kv, table, START + ROWS), plan, each, library=False)
        cuda.attend(queries, kv, table, AttentionPlan(START, ROWS, DISTANCE, heads), scales)


def _join(dim: int, capability: int) -> None:
    """Launch what joins the parts that libraries compute, of many rows and of few, whose heads are folded.

    Two to four regions and blocks of keys are one launch; of more, the first ones are joined in float32 before.
    """
    from workers.kernels.triton.merge import MOST_PARTS

    for rows in (8, ROWS):
        out, by_head = torch.zeros(rows, HEADS, dim, dtype=torch.bfloat16), torch.zeros(HEADS, rows).T
        own, before = (out, by_head), (out, by_head.contiguous() if rows == 8 else by_head)
        for others in range(1, MOST_PARTS + 1):
            torch_backend.merge_on_device([before] * others + [own])


def _select(spec: SparseSpec, capability: int) -> None:
    """Launch everything that selects the keys of a cell."""
    plan = AttentionPlan(START, ROWS, DISTANCE)
    budgets = HeadBudgets(spec, range(1), range(HEADS), "cpu")
    step = StepSelection(spec, [SparseCell(plan, torch.ones(ROWS), 0)], budgets, KV_HEADS, "cpu")
    rows = torch.zeros(ROWS, HEADS, DIM, dtype=torch.bfloat16)
    queries = Queries(rows, rows, rows)
    keys = torch.zeros(KV_HEADS, START + ROWS, DIM, dtype=torch.bfloat16)
    step.select(0, step.estimate.take(queries), step.held_out.take(queries), keys)


def _targets(capability: int) -> Any:
    """Have the attention kernels built as on a GPU of this compute capability."""
    import triton.language as tl

    from workers.kernels.triton.blocks import Target

    major_minor = (capability // 10, capability % 10)
    target = Target(capability >= 90, tl.bfloat16, torch.bfloat16, major_minor)
    choose: Callable[[torch.device], Target] = lambda _: target  # noqa: E731
    return patch.object(Target, "of", staticmethod(choose))
