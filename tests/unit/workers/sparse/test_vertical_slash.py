"""Vertical-slash selection of one cell, against the definition written with whole matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from protos.model.grid import split
from protos.model.spec import HeadBudget, ModelSpec, SparseSpec
from tests.support.data.sparse_cells import (
    Shape,
    attention,
    column_and_offset_sums,
    kept_mass,
    largest,
    random_cell,
    with_heads,
)  # fmt: skip
from workers.attention.plan import Selection
from workers.sparse import adaptive, estimate, selection, vertical_slash
from workers.sparse.selection import FloatArray
from workers.sparse.vertical_slash import cell_number, choose, estimate_rows, held_out_rows


@pytest.fixture(autouse=True)
def _twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vertical_slash, "_backend", lambda cell, kv: (estimate, selection.top))


SHAPES = {
    "first cell": Shape(0, 67, last_q=17),
    "one row": Shape(0, 1),
    "shorter than last_q": Shape(128, 17),
    "prime": Shape(64, 193, last_q=64, page_size=64),
    "no page multiple": Shape(192, 67, last_q=67, page_size=64, heads=2, kv_heads=2),
    "dca borders": Shape(192, 83, distance=96, last_q=13, heads=2, kv_heads=1),
    "dca chunk start": Shape(192, 1, distance=96),
}


@pytest.mark.parametrize("name", SHAPES)
def test_selection_and_recalls_equal_the_definition(name: str) -> None:
    shape = SHAPES[name]
    cell = random_cell(shape)
    budget = HeadBudget(n_vertical=41, n_slash=117)
    choice = choose(*cell.args(uniform=budget, last_q=shape.last_q))
    sampled, held_out = attention(cell, cell.queries.estimate), attention(cell, cell.queries.held_out)
    columns, offsets = column_and_offset_sums(cell, sampled)
    stop = shape.start + shape.length
    for head, kept in enumerate(choice.selections):
        if stop <= budget.n_slash:
            assert kept.offsets.tolist() == [[0, stop - 1]]
            continue
        assert kept.columns.tolist() == largest(columns[head], 41, 30)
        assert np.flatnonzero(selection.offset_map(kept, stop)).tolist() == largest(offsets[head], 117, 100)
        expected = kept_mass(sampled[head], shape.start, cell.queries.estimate.rows, kept)
        assert choice.estimated_recall[head] == pytest.approx(expected, abs=1e-5)
        expected = kept_mass(held_out[head], shape.start, cell.queries.held_out.rows, kept)
        assert choice.held_out_recall[head] == pytest.approx(expected, abs=1e-5)
    assert not any(choice.dense)


@pytest.mark.parametrize(("dtype", "cache"), [(torch.bfloat16, None), (torch.bfloat16, torch.int8),
                                              (torch.float32, torch.int8)])  # fmt: skip
def test_sums_in_other_types(dtype: torch.dtype, cache: torch.dtype | None) -> None:
    cell = random_cell(Shape(160, 67, distance=80, last_q=17, dtype=dtype, cache=cache))
    columns, offsets = column_and_offset_sums(cell, attention(cell, cell.queries.estimate))
    for kv_head in range(2):
        found = estimate.sums(cell.queries.estimate, cell.keys, kv_head)
        heads = slice(kv_head * 2, kv_head * 2 + 2)
        np.testing.assert_allclose(found.columns, columns[heads], atol=2e-5)
        np.testing.assert_allclose(found.offsets, offsets[heads], atol=2e-5)


def test_a_pair_kept_twice_counts_once() -> None:
    cell = random_cell(Shape(192, 67, last_q=17, heads=1, kv_heads=1))
    sampled = attention(cell, cell.queries.estimate)[0]
    found = estimate.sums(cell.queries.estimate, cell.keys, 0)
    both = Selection(np.array([[0, 120], [130, 200]], np.int32), np.arange(0, 259, 3, dtype=np.int32))
    mass = estimate.mass(cell.queries.estimate, cell.keys, 0, found, [both])[0]
    counted_twice = found.columns[0, both.columns].sum() + found.offsets[0, selection.offset_map(both, 259)].sum()
    assert counted_twice > mass + 1
    assert mass / 17 == pytest.approx(kept_mass(sampled, 192, cell.queries.estimate.rows, both), abs=1e-5)


@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 95, 96, 97, 193, 8192])
@pytest.mark.parametrize("last_q", [1, 64])
def test_sampled_rows(length: int, last_q: int) -> None:
    sampled, held_out = estimate_rows(length, last_q), held_out_rows(length, last_q)
    assert sampled == tuple(range(length))[-last_q:]
    assert list(held_out) == sorted(set(held_out))
    assert 0 <= held_out[0] <= held_out[-1] < length
    assert len(held_out) == min(32, length)
    if length >= last_q + 32:
        assert not set(sampled) & set(held_out)
        assert max(np.diff(held_out)) <= length // 32 + 1


@pytest.mark.parametrize(
    ("scores", "count", "always", "expected"),
    [
        ([1, 1, 1, 1, 1], 3, 0, [0, 1, 2]),
        ([0, 5, 1, 5, 5], 2, 0, [1, 3]),
        ([0, 5, 1, 5, 5], 3, 1, [0, 1, 3]),
        ([0, 0, 9], 1, 2, [0, 1]),
        ([3, 2, 1], 3, 0, [0, 1, 2]),
        ([3, 2, 1], 9, 5, [0, 1, 2]),
        ([3, 2, 1], 0, 0, []),
        ([1, np.nan, 2, np.inf], 2, 0, [1, 3]),
    ],
)
def test_top(scores: list[float], count: int, always: int, expected: list[int]) -> None:
    assert selection.top(np.array([scores], np.float32), [count], always)[0].tolist() == expected


@pytest.mark.parametrize(
    ("indices", "expected"), [([], []), ([3], [[3, 3]]), ([0, 1, 2, 4, 6, 7], [[0, 2], [4, 4], [6, 7]])]
)
def test_intervals(indices: list[int], expected: list[list[int]]) -> None:
    assert selection.intervals(np.array(indices, np.int32)).tolist() == expected


@pytest.mark.parametrize("target", [0.3, 0.8, 0.95, 1.0])
def test_adaptive_budgets_reach_their_target_and_no_more(target: float) -> None:
    shape = Shape(448, 193, last_q=64, heads=2, kv_heads=1, dim=64)
    cell = random_cell(shape)
    sampled = attention(cell, cell.queries.estimate)
    choice = choose(*cell.args(target_recall=target))
    for head, kept in enumerate(choice.selections):
        recall = kept_mass(sampled[head], shape.start, cell.queries.estimate.rows, kept)
        assert choice.estimated_recall[head] == pytest.approx(recall, abs=1e-5)
        assert recall >= target - 1e-5
        assert set(range(30)) <= set(kept.columns.tolist()) or kept.offsets.tolist() == [[0, 640]]
        assert kept.offsets[0, 1] >= 99
        if target < 0.9:
            assert recall < target + 0.1


def new_mass(base: float, columns: FloatArray, offsets: FloatArray) -> adaptive.NewMass:
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return adaptive.NewMass(base, adaptive.Changed(columns, *nothing), adaptive.Changed(offsets, *nothing))


def search(mass: adaptive.NewMass, goal: float, kept: Callable[[Selection], float]) -> Selection:
    found = adaptive.AdaptiveSearch(mass, goal)
    while not found.done:
        found.measured(kept(found.selection))
    return found.selection


@pytest.mark.parametrize(("share", "beyond"), [(1.0, 0.01), (0.9, 0.07), (0.3, 0.35)])
def test_adaptive_lists_are_not_much_longer_than_they_must_be(share: float, beyond: float) -> None:
    random = np.random.default_rng(0)
    columns, offsets = (random.exponential(size=700).astype(np.float32) for _ in range(2))

    def kept(one: Selection) -> float:  # the rest of every column is kept by offsets too
        near = selection.offset_map(one, 700)[128:]
        return float(10 + share * columns[one.columns[30:]].sum() + offsets[128:][near].sum())

    columns[:30] = offsets[:128] = 0
    most = kept(Selection.everything(700)) + share * float(columns.sum())
    for part in (0.01, 0.1, 0.5, 0.9, 1.0):
        goal = part * most
        found = search(new_mass(10, columns, offsets), goal, kept)
        assert kept(found) >= min(goal, most) - 1e-3
        assert kept(found) <= goal + beyond * most + 10


@pytest.mark.parametrize("stop", [193, 640, 2017])
def test_adaptive_lists_follow_new_mass_over_cost(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "_CHUNK", 128)
    random = np.random.default_rng(stop)
    columns, offsets = (random.integers(0, 6, stop).astype(np.float32) / 4 for _ in range(2))
    columns[:30] = offsets[:128] = 0
    groups = [offsets[low : low + 64].sum() / 64 for low in range(0, stop, 64)]
    candidates = [(-density, 0, at, density) for at, density in enumerate(columns.tolist())]
    candidates += [(-density, 1, at, 64 * density) for at, density in enumerate(groups)]
    candidates.sort()
    total = sum(one[3] for one in candidates)
    for part in (0.02, 0.3, 0.71, 1.0):
        found = adaptive.AdaptiveSearch(new_mass(3.0, columns, offsets), 3 + part * total).selection
        taken, kept = [], 3.0
        while kept < 3 + part * total - 1e-6:
            kept += candidates[len(taken)][3]
            taken.append(candidates[len(taken)][1:3])
        assert set(found.columns.tolist()) == {at for kind, at in taken if kind == 0} | set(range(30))
        near = {at // 64 for at in np.flatnonzero(selection.offset_map(found, stop)).tolist()}
        assert near == {at for kind, at in taken if kind == 1} | {0, 1}


def test_adaptive_prefers_diagonals_where_the_mass_is_there() -> None:
    columns, offsets = np.full(1024, 0.001, np.float32), np.full(1024, 0.001, np.float32)
    offsets[640:704] = 1.0
    columns[500] = 2.0
    new = new_mass(5, columns, offsets)
    found = search(new, 60, lambda one: 60 if len(one.offsets) > 1 else 5)
    assert found.offsets.tolist() == [[0, 127], [640, 703]]
    assert found.columns.tolist() == [*range(30), 500]


def test_recall_floor_turns_heads_dense_up_to_the_cap() -> None:
    shape = Shape(192, 64, last_q=16, heads=8, kv_heads=2)
    cell = random_cell(shape)
    budget = HeadBudget(30, 100)
    common = {"uniform": budget, "last_q": 16, "cell": 64}
    plain = choose(*cell.args(**common))
    recall = np.array(plain.held_out_recall)
    assert not any(choose(*cell.args(**common, recall_floor=recall.min())).dense)
    every = choose(*cell.args(**common, recall_floor=1.0, max_dense_share=1.0))
    assert all(every.dense)
    assert every.capped == 0
    assert all(one.offsets.tolist() == [[0, 255]] for one in every.selections)
    assert every.held_out_recall == plain.held_out_recall
    half = choose(*cell.args(**common, recall_floor=1.0, max_dense_share=0.5))
    assert half.capped == 4
    for heads in (slice(0, 4), slice(4, 8)):  # the two worst of the heads of each KV head
        assert set(np.flatnonzero(half.dense[heads])) == set(np.argsort(recall[heads])[:2])
    assert not any(choose(*cell.args(**common, recall_floor=1.0, max_dense_share=0.0)).dense)


def test_the_cap_holds_over_all_cells_of_a_prompt() -> None:
    turned = []
    for number in range(7):
        cell = random_cell(Shape(64 * number, 64, last_q=16, heads=6, kv_heads=2, seed=number))
        choice = choose(*cell.args(uniform=HeadBudget(30, 100), last_q=16, cell=64, recall_floor=2.0,
                                   max_dense_share=0.25))  # fmt: skip
        turned.append(sum(choice.dense))
        assert sum(turned) <= 0.25 * 6 * (number + 1)
    assert sum(turned) == 2 * int(0.25 * 3 * 7)


@pytest.mark.parametrize(("cell", "distance"), [(64, 0), (64, 96), (64, 128), (64, 64), (96, 64), (64, 1024)])
def test_cell_number_counts_the_cells_before(cell: int, distance: int) -> None:
    model = cast(ModelSpec, SimpleNamespace(chunk_distance=distance, sparse=SparseSpec(threshold=1, cell=cell)))
    pieces = split(model, 0, 1000, 1000)
    assert [cell_number(start, cell, distance) for start, _ in pieces] == list(range(len(pieces)))


def test_shards_choose_the_same() -> None:
    cell = random_cell(Shape(192, 67, last_q=17, heads=8, kv_heads=4))
    for spec in ({"uniform": HeadBudget(35, 120), "recall_floor": 0.9}, {"synthetic": True}, {"target_recall": 0.8}):
        whole = choose(*cell.args(**spec, last_q=17, cell=64))
        parts = [choose(*with_heads(cell, slice(at, at + 2), slice(at // 2, at // 2 + 1)).args(**spec, last_q=17,
                                                                                              cell=64))
                 for at in range(0, 8, 2)]  # fmt: skip
        assert whole.dense == tuple(one for part in parts for one in part.dense)
        assert whole.held_out_recall == tuple(one for part in parts for one in part.held_out_recall)
        for mine, theirs in zip(whole.selections, [one for part in parts for one in part.selections], strict=True):
            assert np.array_equal(mine.columns, theirs.columns)
            assert np.array_equal(mine.offsets, theirs.offsets)


def test_published_patterns_and_heads_without_one(caplog: pytest.LogCaptureFixture) -> None:
    vertical_slash._warn_dense.cache_clear()
    cell = random_cell(Shape(192, 67, last_q=17, heads=4, kv_heads=2))
    patterns = ((),) * 3 + ((HeadBudget(40, 110), HeadBudget(60, 150), None, None),)
    for _ in range(2):
        choice = choose(*cell.args(patterns=patterns, last_q=17))
    assert [len(one.columns) for one in choice.selections] == [40, 60, 0, 0]
    assert [selection.offset_map(one, 259).sum() for one in choice.selections] == [110, 150, 259, 259]
    assert choice.estimated_recall[2:] == choice.held_out_recall[2:] == (1.0, 1.0)
    assert choice.dense == (False,) * 4
    assert len(caplog.records) == 2  # one a head, once


@pytest.mark.parametrize("budget", [HeadBudget(10**6, 10**6), HeadBudget(0, 10**6)])
def test_budgets_beyond_the_context(budget: HeadBudget) -> None:
    cell = random_cell(Shape(64, 67, last_q=17))
    choice = choose(*cell.args(uniform=budget))
    assert all(one.offsets.tolist() == [[0, 130]] and not len(one.columns) for one in choice.selections)
    assert choice.estimated_recall == choice.held_out_recall == (1.0,) * 4
    assert not any(choice.dense)


def test_all_columns_keep_everything() -> None:
    cell = random_cell(Shape(192, 67, last_q=17))
    choice = choose(*cell.args(uniform=HeadBudget(10**6, 0)))
    assert all(len(one.columns) == 259 and one.offsets.tolist() == [[0, 99]] for one in choice.selections)
    assert np.allclose(choice.estimated_recall + choice.held_out_recall, 1, atol=1e-5)


def test_synthetic_selection_depends_on_the_cell_layer_and_head_only() -> None:
    one, again = (selection.synthetic(100_000, (8192, 3, 1)) for _ in range(2))
    assert one.columns.tolist() == again.columns.tolist()
    assert one.offsets.tolist() == again.offsets.tolist()
    assert len(set(one.columns.tolist())) == 1024
    assert one.offsets[0].tolist() == [0, 1535]
    assert (np.diff(one.offsets, axis=1) >= 63).all()
    for other in ((0, 3, 1), (8192, 2, 1), (8192, 3, 0)):
        assert selection.synthetic(100_000, other).columns.tolist() != one.columns.tolist()
    assert selection.synthetic(10, (0, 0, 0)).offsets.tolist() == [[0, 9]]


def test_synthetic_ignores_budgets_and_floor() -> None:
    cell = random_cell(Shape(2048, 67, last_q=17, heads=2, kv_heads=1, dim=16))
    choice = choose(*cell.args(uniform=HeadBudget(40, 110), recall_floor=2.0, synthetic=True))
    for head, one in enumerate(choice.selections):
        assert one.columns.tolist() == selection.synthetic(2115, (2048, 3, head)).columns.tolist()
    assert all(0.5 < kept < 1 for kept in choice.held_out_recall)
    assert not any(choice.dense)


def test_adaptive_candidates_are_what_the_forced_selection_leaves() -> None:
    shape = Shape(192, 113, last_q=17, heads=2, kv_heads=1)
    cell = random_cell(shape)
    sampled = attention(cell, cell.queries.estimate)
    found, start = estimate.sums(cell.queries.estimate, cell.keys, 0), selection.forced(305)
    assert start.offsets.tolist() == [[0, 127]]
    group = vertical_slash._Group(cell.queries, cell.keys, SparseSpec(), estimate, selection.top, range(2))
    columns, offsets = group._beside_forced(found, 0, start)
    rest = sampled.copy()
    positions = 192 + np.array(cell.queries.estimate.rows)
    rest[:, positions[:, None] - np.arange(305) <= 127] = 0
    rest[:, :, :30] = 0
    for mine, theirs in zip((columns, offsets), column_and_offset_sums(cell, rest), strict=True):
        for head, changed in enumerate(mine):
            np.testing.assert_allclose(changed.part(0, 305), theirs[head], atol=1e-5)
            np.testing.assert_array_equal(changed.part(7, 230), changed.part(0, 305)[7:230])
