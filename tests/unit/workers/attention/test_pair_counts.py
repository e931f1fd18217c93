"""Numbers of pairs, against the lists of keys of every tile."""

import random

import pytest
import torch

from tests.support.data.selections import random_selection
from tests.support.oracles.attention import tile_pairs
from workers.attention.pair_counts import causal_pairs, visited_pairs
from workers.attention.plan import AttentionPlan


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile", [16, 64])
def test_pairs_of_selections(seed: int, tile: int):
    rng = random.Random(seed)
    start, rows = rng.choice((0, 64, 333)), rng.choice((1, 64, 131))
    plan = AttentionPlan(start, rows, 500, tuple(random_selection(start + rows, rng) for _ in range(2)), tile)
    assert [visited_pairs(plan, head) for head in range(2)] == [tile_pairs(plan, head) for head in range(2)]


@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 67), (1, 66), (64, 64), (65, 131)])
def test_pairs_of_dense_plans(start: int, rows: int):
    plan = AttentionPlan(start, rows)
    causal = int(torch.ones(rows, start + rows, dtype=torch.bool).tril(start).sum())
    assert causal_pairs(plan) == visited_pairs(plan, 0) == tile_pairs(plan, 0) == causal
