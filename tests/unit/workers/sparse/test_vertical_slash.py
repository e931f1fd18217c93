"""Vertical-slash selection of one cell, against the definition written with whole matrices in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from protos.model.grid import split
from protos.model.spec import HeadBudget, ModelSpec, SparseSpec
from tests.support.paths import ROOT
from workers.bench.cases.sparse_cells import (
    Shape,
    attention,
    column_and_offset_sums,
    kept_mass,
    largest,
    random_cell,
    with_heads,
)  # fmt: skip
from workers.kernels import build
from workers.sparse import vertical_slash
from workers.sparse.estimate import Estimate
from workers.sparse.selection import forced_selection, offset_mask, synthetic_selection
from workers.sparse.vertical_slash import cell_number, choose, estimate_rows, held_out_rows


@pytest.fixture(autouse=True)
def _torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vertical_slash, "_backend", lambda cell, keys: Estimate)


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
        assert np.flatnonzero(offset_mask(kept, stop)).tolist() == largest(offsets[head], 117, 100)
        expected = kept_mass(sampled[head], shape.start, cell.queries.estimate.rows, kept)
        assert choice.estimated_recall[head] == pytest.approx(expected, abs=1e-5)
        expected = kept_mass(held_out[head], shape.start, cell.queries.held_out.rows, kept)
        assert choice.held_out_recall[head] == pytest.approx(expected, abs=1e-5)
    assert not any(choice.dense)


@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 95, 96, 97, 193, 8192])
@pytest.mark.parametrize("last_q", [1, 64])
def test_sampled_rows(length: int, last_q: int) -> None:
    sampled, held_out = estimate_rows(length, last_q), held_out_rows(length, last_q)
    assert sampled == range(length)[-last_q:]
    assert list(held_out) == sorted(set(held_out))
    assert 0 <= held_out[0] <= held_out[-1] < length
    assert len(held_out) == min(32, length)
    if length >= last_q + 32:
        assert not set(sampled) & set(held_out)
        assert max(np.diff(held_out)) <= length // 32 + 1


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


def test_recall_floor_turns_heads_dense_up_to_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    vertical_slash.warn_cap.cache_clear()
    shape = Shape(192, 64, last_q=16, heads=8, kv_heads=2)
    cell = random_cell(shape)
    budget = HeadBudget(30, 100)
    common = {"uniform": budget, "last_q": 16, "cell": 64}
    plain = choose(*cell.args(**common))
    recall = np.array(plain.held_out_recall)
    assert not any(choose(*cell.args(**common, recall_floor=recall.min())).dense)
    every = choose(*cell.args(**common, recall_floor=1.0, max_dense_share=1.0))
    assert all(every.dense)
    assert not caplog.records
    assert all(one.offsets.tolist() == [[0, 255]] for one in every.selections)
    assert every.held_out_recall == plain.held_out_recall
    half = choose(*cell.args(**common, recall_floor=1.0, max_dense_share=0.5))
    assert "more heads than max_dense_share 0.5" in caplog.text
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
    vertical_slash.warn_dense.cache_clear()
    cell = random_cell(Shape(192, 67, last_q=17, heads=4, kv_heads=2))
    patterns = ((),) * 3 + ((HeadBudget(40, 110), HeadBudget(60, 150), None, None),)
    for _ in range(2):
        choice = choose(*cell.args(patterns=patterns, last_q=17))
    assert [len(one.columns) for one in choice.selections] == [40, 60, 0, 0]
    assert [offset_mask(one, 259).sum() for one in choice.selections] == [110, 150, 259, 259]
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


def test_synthetic_ignores_budgets_and_floor() -> None:
    cell = random_cell(Shape(2048, 67, last_q=17, heads=2, kv_heads=1, dim=16))
    choice = choose(*cell.args(uniform=HeadBudget(40, 110), recall_floor=2.0, synthetic=True))
    for head, one in enumerate(choice.selections):
        assert one.columns.tolist() == synthetic_selection(2115, (2048, 3, head)).columns.tolist()
    assert all(0.5 < kept < 1 for kept in choice.held_out_recall)
    assert not any(choice.dense)


def test_adaptive_candidates_are_what_the_forced_selection_leaves() -> None:
    shape = Shape(192, 113, last_q=17, heads=2, kv_heads=1)
    cell = random_cell(shape)
    sampled = attention(cell, cell.queries.estimate)
    estimates = [Estimate(rows, cell.keys, 0) for rows in (cell.queries.estimate, cell.queries.held_out)]
    found, start = estimates[0].sums(), forced_selection(305)
    assert start.offsets.tolist() == [[0, 127]]
    group = vertical_slash._Group(cell.queries, SparseSpec(), *estimates)
    columns, offsets = group._without_forced(found, start)
    rest = sampled.copy()
    positions = 192 + np.array(cell.queries.estimate.rows)
    rest[:, positions[:, None] - np.arange(305) <= 127] = 0
    rest[:, :, :30] = 0
    for mine, theirs in zip((columns, offsets), column_and_offset_sums(cell, rest), strict=True):
        for head, changed in enumerate(mine):
            np.testing.assert_allclose(changed.slice(0, 305), theirs[head], atol=1e-5)
            np.testing.assert_array_equal(changed.slice(7, 230), changed.slice(0, 305)[7:230])


# In a process of its own, whose peak can be set back; the small cell loads what is loaded once.
MEASURE = """
import gc, json, sys, torch
from protos.model.spec import HeadBudget
from workers.bench.cases.sparse_cells import Shape, random_cell
from workers.sparse.vertical_slash import choose

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

stop, heads, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
spec = {"adaptive": {}, "fixed": {"uniform": HeadBudget(1024, 2048)}}[kind]
torch.set_num_threads(2)
of = [random_cell(Shape(size - 4096, 4096, page_size=256, heads=heads, kv_heads=1, dim=32, dtype=torch.bfloat16))
      for size in (8192, stop)]
choose(*of[0].args(**spec))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
kept = choose(*of[1].args(**spec))
print(json.dumps({"peak": status("VmHWM") - before, "columns": [len(one.columns) for one in kept.selections]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: PyTorch keeps whole matrices")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux: the peak cannot be measured")
@pytest.mark.parametrize(("kind", "heads"), [("fixed", 8), ("fixed", 1), ("adaptive", 8), ("adaptive", 3)])
def test_memory_in_flight(kind: str, heads: int) -> None:
    """What choosing the keys of a cell takes beside the cache: at most 16 bytes per key and head."""
    stop = 1 << 19
    command = [sys.executable, "-c", MEASURE, str(stop), str(heads), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 4 * stop * heads < found["peak"] <= 16 * stop * heads
    assert min(found["columns"]) >= 1000
