"""What the rates of attention count."""

from __future__ import annotations

from pathlib import Path

import torch

from workers.attention.plan import AttentionPlan
from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal
from workers.bench.gpu.rates.attention import kernel_rate


def test_the_rate_of_the_sparse_kernel_leaves_dense_heads_out(tmp_path: Path) -> None:
    """Another kernel computes them: with their pairs a launch that does nothing would be the fastest of all."""
    context, plan = Context(Journal(tmp_path / "x", "x"), torch.device("cpu"), 0.0), AttentionPlan(96, 32)
    dense = plan.causal_pairs
    rate = kernel_rate(context, 1e-3, torch.tensor([500, dense, 1500]), plan, 128)
    assert rate["tflops"] == 4 * 2000 * 128 / 1e-3 / 1e12
    assert kernel_rate(context, 1e-5, torch.tensor([dense, dense]), plan, 128).get("tflops") is None
    assert kernel_rate(context, None, torch.tensor([500]), plan, 128).get("tflops") is None
