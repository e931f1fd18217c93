"""Muon: which parameters it trains, and the singular values of its updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.data.training import tiny_model
from workers.training import needle
from workers.training.muon import is_matrix, orthogonalise

ASSETS = needle.ASSETS


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (64, 16), (3, 16, 40), (1, 7)])
def test_singular_values_become_about_one(size: tuple[int, ...]) -> None:
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3


def test_muon_owns_projections_only(assets: Path) -> None:
    names = {name for name, _ in tiny_model(assets).named_parameters()}
    others = {name for name in names if not is_matrix(name)}
    assert all("norm" in name or name.endswith(("embed_tokens.weight", "mlp.gate.weight")) for name in others)
    assert len(names - others) == 2 * 7
