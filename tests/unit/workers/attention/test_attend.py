"""One piece of a step, on whatever kernels the inputs allow, against the definition."""

from __future__ import annotations

import random

import pytest
import torch

from workers.attention import compiled
from workers.attention.attend import attend
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.cases.attention import attend_reference, tile_pairs
from workers.bench.cases.selections import random_selection
from workers.kv.paged import LayerKV, PageTable


@pytest.mark.parametrize("kernels", ["of this machine", "of PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (17, 67), (193, 17)])
def test_output_and_visited_pairs(
    start: int, rows: int, sparse: bool, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "of PyTorch":
        monkeypatch.setattr(compiled, "supports", lambda *_: False)
    torch.manual_seed(start)
    stop, heads = start + rows, 4
    table = PageTable(16)
    table.append(list(range(-(-stop // 16))))
    k, v = torch.randn(2, stop, 2, 32).to(dtype)
    caches = torch.zeros(2, 2, table.num_pages * 16, 32, dtype=dtype)
    caches[0, :, :stop], caches[1, :, :stop] = k.transpose(0, 1), v.transpose(0, 1)
    rng = random.Random(start)
    plan = AttentionPlan(
        start, rows, heads=tuple(random_selection(stop, rng) for _ in range(heads)) if sparse else None
    )
    q, scales = Queries(torch.randn(rows, heads, 32).to(dtype)), torch.full((rows,), 32**-0.5)
    visited = torch.zeros(heads, dtype=torch.int64)
    got = attend(q, LayerKV(caches[0], caches[1]), table, plan, scales, visited)
    assert got.dtype == dtype
    tolerance = 1.6e-2 if dtype == torch.bfloat16 else 4e-6
    wanted = attend_reference(q, k, v, plan, scales)
    torch.testing.assert_close(got.double(), wanted.double(), atol=tolerance, rtol=tolerance)
    assert visited.tolist() == [tile_pairs(plan, head) for head in range(heads)]
