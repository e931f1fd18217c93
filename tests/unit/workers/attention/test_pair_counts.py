"""Counts of pairs against the lists of keys that they stand for."""

from __future__ import annotations

import random

import pytest
import torch

from tests.support.data.selections import random_selection
from tests.support.oracles.attention import tile_pairs
from workers.attention.pair_counts import causal_pairs, visited_pairs
from workers.attention.plan import AttentionPlan, Selection


@pytest.mark.parametrize(("start", "rows", "tile"), [(0, 1, 64), (17, 67, 16), (193, 1, 1), (333, 131, 64)])
def test_dense_counts_are_those_of_the_causal_mask(start: int, rows: int, tile: int) -> None:
    plan = AttentionPlan(start, rows, tile=tile)
    causal = int(torch.ones(rows, start + rows, dtype=torch.bool).tril(start).sum())
    assert causal_pairs(plan) == visited_pairs(plan, 0) == tile_pairs(plan, 0) == causal


@pytest.mark.parametrize("seed", range(8, 16))
def test_selected_counts_are_those_of_the_lists(seed: int) -> None:
    rng = random.Random(seed)
    start, rows = rng.choice((0, 17, 193)), rng.choice((1, 67, 131))
    heads = tuple(random_selection(start + rows, rng) for _ in range(3))
    plan = AttentionPlan(start, rows, heads=heads, tile=rng.choice((1, 16, 64)))
    for head in range(3):
        assert visited_pairs(plan, head) == tile_pairs(plan, head) <= causal_pairs(plan)


def test_everything_is_causal() -> None:
    plan = AttentionPlan(17, 67, heads=(Selection.everything(84),))
    assert visited_pairs(plan, 0) == causal_pairs(plan)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile", [16, 64])
def test_pairs_of_selections(seed: int, tile: int):
    rng = random.Random(seed)
    start, rows = rng.choice((0, 64, 333)), rng.choice((1, 64, 131))
    plan = AttentionPlan(start, rows, 500, tuple(random_selection(start + rows, rng) for _ in range(2)), tile)
    assert [visited_pairs(plan, head) for head in range(2)] == [tile_pairs(plan, head) for head in range(2)]
