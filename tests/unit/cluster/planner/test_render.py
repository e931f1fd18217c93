"""What people read has every figure of the plan, in 80 columns."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from cluster.latency.hardware import load_hardware
from cluster.planner.plan import make_plan
from cluster.planner.render import render_plan
from cluster.planner.target import gpu_target, have_target
from tests.support.planner.models import subject


def shown(folder: Path, hardware: str) -> str:
    table = load_hardware()
    target = have_target(table, hardware) if "GB" in hardware else gpu_target(table, hardware)
    out = io.StringIO()
    render_plan(make_plan(subject(folder), 1 << 20, target), Console(file=out, width=80))
    return out.getvalue()


def test_a_plan_that_fits(tmp_path: Path):
    text = shown(tmp_path, "h200")
    assert "KV takes 96KiB" in text
    assert "1,048,576 tokens on 2 x NVIDIA H200 SXM" in text
    assert "fits as 2 stages x 1 shard\n" in text
    assert "predicted prefill: dense" in text
    bf16 = next(line for line in text.splitlines() if line.startswith("bf16"))
    assert bf16.split() == ["bf16", "61.1", "61.2", "67.5", "73.9", "86.8", "112.6", "164.1"]
    assert "int4" in text
    assert "note: the positions cover" in text


def test_a_plan_that_does_not(tmp_path: Path):
    text = shown(tmp_path, "2x24GB")
    assert "does not fit as 2 stages x 1 shard" in text
    assert "why not: the weights alone need" in text
    assert "times: unknown" in text
