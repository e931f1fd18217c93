"""Keys of sparse rows at contexts longer than any that was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.latency.sparsity import TILE, Sparsity, budget_keys
from protos.model.spec import HeadBudget, ModelSpec, SparseSpec
from tests.support.rigs.scheduler import long_spec

CONTEXTS = [1024.0 + 2048 * cell for cell in range(13)]  # mean contexts of the first tenth of 256K in cells of 2,048


def _spec(sparse: SparseSpec) -> ModelSpec:
    return replace(long_spec(), sparse=sparse)


FIXED = _spec(SparseSpec(uniform=HeadBudget(1024, 2048)))
ADAPTIVE = _spec(SparseSpec())


def _fitted(spec: ModelSpec | None, keys: list[float]) -> Sparsity:
    fit = Sparsity(spec)
    for context, visited in zip(CONTEXTS, keys, strict=True):
        fit.observe(context, visited / context)
    return fit


def test_before_the_first_cell():
    contexts = np.array([1000.0, 1e6])
    assert Sparsity().keys(contexts).tolist() == [1000.0, 1e6]
    assert Sparsity(ADAPTIVE).keys(contexts).tolist() == [1000.0, 1e6]
    assert Sparsity(FIXED).keys(contexts).tolist() == [1000.0, 1024 + 2048 + TILE]


def test_fixed_budgets_do_not_grow_with_the_context():
    """Rows visit all keys of short contexts, then somewhat more than the budgets: so it stays."""
    fit = _fitted(FIXED, [min(context, 3500.0) for context in CONTEXTS])
    assert fit.keys(np.array([131_072.0]))[0] == pytest.approx(3500, rel=0.02)
    assert fit.keys(np.array([1e6]))[0] == pytest.approx(3500, rel=0.02)
    assert fit.keys(np.array([100.0]))[0] <= 100


def test_heads_that_turn_dense_are_seen():
    """A tenth of the heads turned dense: their part grows with the context."""
    fit = _fitted(FIXED, [0.9 * min(context, 3136.0) + 0.1 * context for context in CONTEXTS])
    truth = 0.9 * 3136 + 0.1 * 131_072
    assert 0.3 * truth < fit.keys(np.array([131_072.0]))[0] < truth


@pytest.mark.parametrize("slope", [0.3, 0.5, 0.6])
def test_adaptive_budgets_grow_as_a_power(slope: float):
    fit = _fitted(ADAPTIVE, [min(context, 30 * context**slope) for context in CONTEXTS])
    assert fit.keys(np.array([100_000.0]))[0] == pytest.approx(30 * 100_000**slope, rel=0.35)


def test_budgets_of_patterns():
    """Heads with budgets of their own, and one that is dense."""
    layer = (HeadBudget(100, 100), HeadBudget(1000, 1000), None)
    spec = _spec(SparseSpec(patterns=(layer, layer)))
    expected = (200 + TILE + 2000 + TILE + 1e6) / 3
    assert budget_keys(spec, np.array([1e6])).tolist() == [pytest.approx(expected)]
    assert budget_keys(ADAPTIVE, np.array([1e6])).tolist() == [1e6]
