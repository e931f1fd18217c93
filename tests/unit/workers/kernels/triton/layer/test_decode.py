"""Decode attention against float64 with the definition of a plan."""

from __future__ import annotations

import math

import pytest
import torch

from workers.attention.plan import AttentionPlan, Queries
from workers.bench.cases.attention import attend_reference
from workers.kernels.triton.layer.decode import Rows, attend_rows, count_splits
from workers.kv.paged import LayerKV, quantise

FP8 = torch.float8_e4m3fn
PAGE = 16


def paged(lengths: list[int], kv_heads: int, dim: int, cache: torch.dtype) -> tuple[LayerKV, torch.Tensor]:
    """Make a cache of random rows, and tables of pages in random order; what no row sees is not finite."""
    pages = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(pages)).int() * PAGE
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    seen = torch.zeros(sum(pages) * PAGE, dtype=torch.bool)
    for row, first in enumerate(order.split(pages)):
        tables[row, : pages[row]] = first
        slots = (first[:, None] + torch.arange(PAGE)).flatten()[: lengths[row]]
        seen[slots.long()] = True
    sides = torch.randn(2, kv_heads, len(seen), dim)
    if cache == torch.float32:
        sides[:, :, ~seen] = math.nan
        return LayerKV(*sides), tables
    codes, scales = quantise(sides, cache)
    scales[:, :, ~seen] = math.nan
    return LayerKV(*codes, *scales), tables


def context(kv: LayerKV, table: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Return keys and values `[S, K, D]` in float64."""
    slots = (table[:, None] + torch.arange(PAGE)).flatten()[:length].long()
    sides = ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
    rows = [(side[:, slots].double(), None if scales is None else scales[:, slots]) for side, scales in sides]
    return [(side if scales is None else side * scales[..., None]).transpose(0, 1) for side, scales in rows]


def compare(lengths: list[int], distance: int, splits: int, cache: torch.dtype, heads: tuple[int, int, int]) -> None:
    query_heads, kv_heads, dim = heads
    torch.manual_seed(sum(lengths))
    kv, tables = paged(lengths, kv_heads, dim, cache)
    q = torch.randn(3 if distance else 1, len(lengths), query_heads, dim)
    scales = torch.rand(len(lengths)) * 0.2 + 0.1
    order = torch.randperm(len(lengths)).int()  # tables may lie in any order
    shuffled = torch.empty_like(tables)
    shuffled[order.long()] = tables
    rows = Rows(shuffled, order, torch.tensor(lengths, dtype=torch.int32), scales, PAGE, distance, splits)
    got = attend_rows(q, kv, rows)
    for row, length in enumerate(lengths):
        plan = AttentionPlan(length - 1, 1, distance)
        queries = Queries(*(side[row : row + 1].double() for side in q))
        expected = attend_reference(queries, *context(kv, tables[row], length), plan, scales[row : row + 1])
        assert (got[row].double() - expected[0]).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("cache", [torch.float32, torch.int8, FP8], ids=str)
def test_contexts_that_end_around_pages_and_blocks(cache: torch.dtype) -> None:
    compare([1, 16, 17, 65, 193], 0, 2, cache, (4, 2, 32))


@pytest.mark.parametrize("cache", [torch.float32, torch.int8, FP8], ids=str)
def test_contexts_that_end_around_chunks(cache: torch.dtype) -> None:
    compare([96, 97, 192, 193, 400], 96, 2, cache, (2, 1, 32))


@pytest.mark.parametrize("splits", [1, 9])
def test_any_number_of_splits(splits: int) -> None:
    compare([67, 450], 128, splits, torch.int8, (2, 1, 16))


@pytest.mark.parametrize("heads", [(5, 1, 24), (24, 1, 16), (2, 2, 80)])
def test_any_group_and_head_dim(heads: tuple[int, int, int]) -> None:
    compare([130, 17], 0, 2, torch.float32, heads)


def test_one_rotation_where_no_row_has_left_the_first_chunk() -> None:
    kv, tables = paged([90], 2, 16, torch.float32)
    rows = Rows(tables, torch.zeros(1).int(), torch.tensor([90]), torch.tensor([0.25]), PAGE, 96, 2)
    q = torch.randn(1, 1, 2, 16)
    expected = attend_reference(Queries(q[0].double()), *context(kv, tables[0], 90), AttentionPlan(89, 1), rows.scales)
    assert (attend_rows(q, kv, rows)[0].double() - expected[0]).abs().max() < 1e-6


def test_rows_of_one_sequence_share_a_table() -> None:
    """Some rows of a prompt, each of which sees one key more than the row before it."""
    kv, tables = paged([203], 2, 16, torch.int8)
    start, count = 200, 3
    lengths = torch.arange(start + 1, start + count + 1)
    rows = Rows(tables, torch.zeros(count).int(), lengths, torch.ones(count), PAGE, 128, 2)
    q = torch.randn(3, count, 4, 16)
    plan = AttentionPlan(start, count, 128)
    expected = attend_reference(Queries(*q.double()), *context(kv, tables[0], 203), plan, rows.scales)
    assert (attend_rows(q, kv, rows).double() - expected).abs().max() < 1e-5


def test_rows_that_fill_a_graph_are_zero_and_damage_stays_visible() -> None:
    kv, tables = paged([70, 70], 1, 16, torch.float32)
    kv.keys[0, tables[1, 2]] = math.nan
    lengths = torch.tensor([0, 70], dtype=torch.int32)
    rows = Rows(tables, torch.arange(2).int(), lengths, torch.ones(2), PAGE, 0, 4)
    got = attend_rows(torch.randn(1, 2, 2, 16), kv, rows)
    assert not got[0].any()
    assert got[1].isnan().all()


def test_splits_fill_the_card_but_are_not_too_short() -> None:
    assert count_splits(1, 4, 132, 1 << 20) == 99
    assert count_splits(64, 4, 132, 1 << 20) == 2
    assert count_splits(1, 4, 132, 1000) == 4
    assert count_splits(1, 1, 132, 1 << 20) == 256
    assert count_splits(500, 8, 132, 0) == 1
