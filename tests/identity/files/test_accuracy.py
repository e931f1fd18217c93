"""Copies of a checkpoint in every format that the script makes lose here what they lose in transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.bench.make_variants import BLOCK, fp8, make
from tests.support.data.checkpoints import make_checkpoint
from workers.eval.accuracy import AccuracySetup, run_accuracy

IDS = tuple((7 * i) % 251 for i in range(40))
SIZES = {"hidden_size": 128, "intermediate_size": 256}


def test_formats_lose_here_what_they_lose_in_transformers(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny", "qwen2_tied", **SIZES)
    _, *copies = make(source, tmp_path / "out", ["int8", "int4"], 64, None)
    rows = run_accuracy(AccuracySetup(source, tuple(copies), IDS, torch.float32), lambda text: None)
    assert [row["name"] for row in rows] == ["tiny", "tiny", "int8", "int4"]
    assert rows[1]["ours"]["kl_mean"] == 0.0
    for row in rows[2:]:
        assert row["between"]["kl_max"] < 1e-8
        assert row["ours"]["kl_mean"] == pytest.approx(row["reference"]["kl_mean"], rel=1e-2)
        assert row["bytes"] < rows[0]["bytes"]
    assert rows[3]["ours"]["kl_mean"] > 10 * rows[2]["ours"]["kl_mean"] > 0


def test_copies_that_exist_are_not_made_again(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tiny", "qwen2_tied", **SIZES)
    paths = make(source, tmp_path / "out", ["fp8", "q8_0"], 64, None)
    assert [path.name for path in paths] == ["tiny", "fp8", "q8_0.gguf"]
    before = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in make(source, tmp_path / "out", ["fp8", "q8_0"], 64, None)] == before
    _, plain, eight, file = run_accuracy(AccuracySetup(source, tuple(paths[1:]), IDS, torch.float32), lambda text: None)
    assert plain["reference"]["kl_mean"] == 0.0
    assert 0 < file["ours"]["kl_mean"] < eight["ours"]["kl_mean"] < 1.0  # random weights lose more than trained ones
    if importlib.util.find_spec("accelerate") is not None:
        assert eight["between"]["kl_max"] < 1e-8
    else:
        assert "accelerate" in eight["reference"]["problem"]


def test_fp8_scales_blocks_of_128() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    weight[:BLOCK, :BLOCK] *= 100
    codes, scales = fp8(weight)
    assert (codes.shape, scales.shape, codes.dtype) == ((200, 300), (2, 3), torch.float8_e4m3fn)
    wide = scales.repeat_interleave(BLOCK, 0)[:200].repeat_interleave(BLOCK, 1)[:, :300]
    error = (codes.float() * wide - weight).abs()
    assert float((error / weight.abs().clamp(min=float(wide.max()) / 448)).max()) < 0.07  # half of 2^-3 and rounding
    assert float(scales[0, 0]) == pytest.approx(float(weight[:BLOCK, :BLOCK].abs().max()) / 448.0)
