"""Plans: which pairs they visit, under which rotation, and what they refuse."""

import random

import pytest
import torch

from workers.attention.plan import AttentionPlan, Queries, Rotation, Selection
from workers.bench.cases.attention import UNVISITED, plan_tags, tile_pairs
from workers.bench.cases.selections import random_selection

DISTANCE = 64
BORDERS = [(0, 64), (63, 1), (64, 1), (64, 17), (127, 1), (128, 1), (128, 64), (130, 61), (448, 64), (455, 1)]


@pytest.mark.parametrize("tile", [1, 16, 67, 4096])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 67), (1, 66), (64, 64), (65, 131)])
def test_a_dense_plan_is_the_causal_mask(start: int, rows: int, tile: int):
    plan = AttentionPlan(start, rows, tile=tile)
    tags = plan_tags(plan, 0, start + rows)
    causal = torch.ones(rows, start + rows, dtype=torch.bool).tril(start)
    assert torch.equal(tags == Rotation.INTRA, causal)
    assert torch.equal(tags == UNVISITED, ~causal)
    assert tile_pairs(plan, 0) == int(causal.sum())
    tiles = list(plan.tile_keys(0))
    assert [row for part in tiles for row in range(part.start, part.stop)] == list(range(rows))
    assert max(part.stop - part.start for part in tiles) <= tile


@pytest.mark.parametrize(("start", "rows"), BORDERS)
def test_tags_depend_on_the_chunks_of_both(start: int, rows: int):
    tags = plan_tags(AttentionPlan(start, rows, DISTANCE), 0, start + rows)
    for row in range(rows):
        position = start + row
        for key in range(start + rows):
            behind = position // DISTANCE - key // DISTANCE
            assert int(tags[row, key]) == (UNVISITED if key > position else min(behind, 2))


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_visits_at_least_what_a_head_selects(seed: int):
    rng = random.Random(seed)
    start, rows = rng.choice((0, 64, 333)), rng.choice((1, 64, 131))
    selection = random_selection(start + rows, rng)
    plan = AttentionPlan(start, rows, 500, (selection,))
    visited = plan_tags(plan, 0, start + rows) != UNVISITED
    distance = torch.arange(start, start + rows)[:, None] - torch.arange(start + rows)
    wanted = torch.zeros_like(visited)
    for low, high in selection.offsets.tolist():
        wanted |= (distance >= low) & (distance <= high)
    wanted[:, torch.from_numpy(selection.columns).long()] = True
    wanted &= distance >= 0
    assert not bool((wanted & ~visited).any())
    assert tile_pairs(plan, 0) == int(visited.sum()), "no pair is counted twice"


@pytest.mark.parametrize(
    ("start", "length", "tile", "distance"), [(-1, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, -1)]
)
def test_an_impossible_plan_is_refused(start: int, length: int, tile: int, distance: int):
    with pytest.raises(ValueError, match="attention plan: start"):
        AttentionPlan(start, length, distance, tile=tile)


def test_a_plan_stays_in_one_chunk():
    with pytest.raises(ValueError, match="rows 60 to 64 cross a DCA chunk of 64 tokens"):
        AttentionPlan(60, 5, 64)


@pytest.mark.parametrize(("start", "rows", "tile"), [(0, 1, 64), (17, 67, 16), (193, 1, 1), (333, 131, 64)])
def test_dense_counts_are_those_of_the_causal_mask(start: int, rows: int, tile: int) -> None:
    plan = AttentionPlan(start, rows, tile=tile)
    causal = int(torch.ones(rows, start + rows, dtype=torch.bool).tril(start).sum())
    assert plan.causal_pairs == plan.visited_pairs(0) == tile_pairs(plan, 0) == causal


@pytest.mark.parametrize("seed", range(8, 16))
def test_selected_counts_are_those_of_the_lists(seed: int) -> None:
    rng = random.Random(seed)
    start, rows = rng.choice((0, 17, 193)), rng.choice((1, 67, 131))
    heads = tuple(random_selection(start + rows, rng) for _ in range(3))
    plan = AttentionPlan(start, rows, heads=heads, tile=rng.choice((1, 16, 64)))
    for head in range(3):
        assert plan.visited_pairs(head) == tile_pairs(plan, head) <= plan.causal_pairs


def test_everything_is_causal() -> None:
    plan = AttentionPlan(17, 67, heads=(Selection.everything(84),))
    assert plan.visited_pairs(0) == plan.causal_pairs


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile", [16, 64])
def test_pairs_of_selections(seed: int, tile: int):
    rng = random.Random(seed)
    start, rows = rng.choice((0, 64, 333)), rng.choice((1, 64, 131))
    plan = AttentionPlan(start, rows, 500, tuple(random_selection(start + rows, rng) for _ in range(2)), tile)
    assert [plan.visited_pairs(head) for head in range(2)] == [tile_pairs(plan, head) for head in range(2)]


def test_rows_by_rotation() -> None:
    intra, succ, inter = torch.randn(3, 67, 4, 32)
    queries = Queries(intra, succ, inter)
    for rotation, rows in zip(Rotation, (intra, succ, inter), strict=True):
        assert queries.of(rotation) is rows
    part = queries[17:18]
    assert torch.equal(part.of(Rotation.INTER), inter[17:18])
    assert part.intra.data_ptr() == intra[17].data_ptr()


def test_a_rotation_that_is_not_there_is_named() -> None:
    queries = Queries(torch.randn(1, 4, 32))[0:1]
    assert queries.succ is None
    with pytest.raises(AssertionError, match="needs SUCC queries"):
        queries.of(Rotation.SUCC)


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 67), (333, 64), (333, 131)])
def test_whole_tiles(start: int, rows: int, tile: int) -> None:
    """The last tile visits what it would as a whole one in a longer cell, before its own last row."""
    rng = random.Random(tile + rows)
    whole = -(-rows // tile) * tile
    heads = tuple(random_selection(start + rows, rng) for _ in range(3))
    plan = AttentionPlan(start, rows, heads=heads, tile=tile, whole_tiles=True)
    longer = AttentionPlan(start, whole, heads=heads, tile=tile)
    for head in range(3):
        tags, wanted = plan_tags(plan, head, start + whole), plan_tags(longer, head, start + whole)
        assert torch.equal(tags, wanted[:rows])
        assert plan.visited_pairs(head) == int((tags != UNVISITED).sum())


def test_tiles_of_each_head() -> None:
    rng = random.Random(7)
    heads = tuple(random_selection(400, rng) for _ in range(3))
    mixed = AttentionPlan(333, 67, heads=heads, whole_tiles=True, head_tiles=(16, 128, 64))
    for head, tile in enumerate((16, 128, 64)):
        alike = AttentionPlan(333, 67, heads=heads, tile=tile, whole_tiles=True)
        assert torch.equal(plan_tags(mixed, head, 400), plan_tags(alike, head, 400))
        assert mixed.visited_pairs(head) == alike.visited_pairs(head)
