"""The absolute grid: where prompts are cut, at the published sizes and at the edges of small ones."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.model.grid import is_sparse, largest_cell, last_cut, next_cut, split, whole_cells
from protos.model.spec import DualChunkSpec, ModelSpec, SparseSpec
from tests.support.rigs.scheduler import PLAIN, long_spec

PUBLISHED = replace(PLAIN, dual_chunk=DualChunkSpec(262_144, 8192, 262_144), sparse=SparseSpec())
NEEDLE = replace(PLAIN, dual_chunk=DualChunkSpec(4096, 512, 4096), sparse=SparseSpec(8192))
DENSE_DCA = replace(PUBLISHED, sparse=None)
NO_DCA = replace(PLAIN, sparse=SparseSpec())
PUBLISHED_L, NEEDLE_L = 253_952, 3584


def test_published_sizes():
    assert PUBLISHED.chunk_distance == PUBLISHED_L == 31 * 8192
    assert NEEDLE.chunk_distance == NEEDLE_L
    assert [largest_cell(spec) for spec in (PUBLISHED, NEEDLE, NO_DCA, DENSE_DCA, PLAIN)] == [8192, 3584, 8192, 0, 0]


@pytest.mark.parametrize(
    ("spec", "position", "prompt", "expected"),
    [
        (PUBLISHED, 0, 32_768, False),
        (PUBLISHED, 0, 32_769, True),
        (PUBLISHED, 32_768, 32_769, True),
        (PUBLISHED, 32_769, 32_769, False),
        (DENSE_DCA, 0, 1_000_000, False),
        (PLAIN, 0, 1_000_000, False),
    ],
)
def test_is_sparse(spec: ModelSpec, position: int, prompt: int, expected: bool):
    assert is_sparse(spec, position, prompt) is expected


@pytest.mark.parametrize(
    ("spec", "position", "prompt", "cut"),
    [
        (PLAIN, 12_345, 20_000, None),
        (NO_DCA, 0, 100, None),
        (NO_DCA, 0, 40_000, 8192),
        (NO_DCA, 40_000, 40_000, None),  # generated tokens
        (DENSE_DCA, 0, 1_000_000, PUBLISHED_L),
        (DENSE_DCA, PUBLISHED_L - 1, 1_000_000, PUBLISHED_L),
        (DENSE_DCA, PUBLISHED_L, 1_000_000, 2 * PUBLISHED_L),
        (PUBLISHED, 0, 1_009_999, 8192),
        (PUBLISHED, 8191, 1_009_999, 8192),
        (PUBLISHED, 8192, 1_009_999, 16_384),
        (PUBLISHED, PUBLISHED_L - 1, 1_009_999, PUBLISHED_L),
        (PUBLISHED, PUBLISHED_L, 1_009_999, PUBLISHED_L + 8192),
        (PUBLISHED, 1_007_616, 1_009_999, 1_009_999),
        (PUBLISHED, 1_009_999, 1_009_999, 4 * PUBLISHED_L),  # dense again
        (NEEDLE, 0, 9001, 3584),
        (NEEDLE, 3583, 9001, 3584),
        (NEEDLE, 3584, 9001, 7168),
        (NEEDLE, 7168, 9001, 8192),
        (NEEDLE, 8192, 9001, 9001),
        (NEEDLE, 8192, 20_000, 10_752),
        (NEEDLE, 0, 8192, 3584),  # dense: only the border of the chunk
        (NEEDLE, 7168, 8192, 10_752),
    ],
)
def test_next_cut(spec: ModelSpec, position: int, prompt: int, cut: int | None):
    assert next_cut(spec, position, prompt) == cut


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [(1, 8192), (8191, 8192), (8192, 8192), (8193, 8192), (16_383, 8192), (16_384, 16_384), (1 << 30, 40_001)],
)
def test_whole_cells_of_a_prompt(budget: int, tokens: int):
    assert whole_cells(PUBLISHED, 0, budget, 40_001) == tokens


def test_whole_cells_across_a_chunk_and_at_the_end():
    assert whole_cells(NEEDLE, 0, 8192, 20_000) == 8192  # three cells: 3584, 3584, 1024
    assert whole_cells(NEEDLE, 7168, 100, 20_000) == 1024
    assert whole_cells(NEEDLE, 17_920, 1 << 20, 20_000) == 2080
    assert whole_cells(PUBLISHED, 32_768, 1, 32_769) == 1


@pytest.mark.parametrize(
    ("spec", "prompt", "stable"),
    [
        (PLAIN, 12_345, 12_345),
        (DENSE_DCA, 12_345, 12_345),
        (PUBLISHED, 32_768, 32_768),  # dense
        (PUBLISHED, 32_769, 32_768),
        (PUBLISHED, 40_959, 32_768),
        (PUBLISHED, 40_960, 40_960),
        (PUBLISHED, PUBLISHED_L - 1, PUBLISHED_L - 8192),
        (PUBLISHED, PUBLISHED_L, PUBLISHED_L),
        (NEEDLE, 8193, 8192),
        (NEEDLE, 10_751, 8192),
        (NEEDLE, 10_752, 10_752),
        (NEEDLE, 16_384, 16_384),
        (NEEDLE, 16_383, 14_336),
    ],
)
def test_stable_prefix(spec: ModelSpec, prompt: int, stable: int):
    assert last_cut(spec, prompt, prompt) == stable
    assert last_cut(spec, stable, prompt) == stable


SPECS = st.sampled_from([
    long_spec(), long_spec(100, 64), long_spec(0, 64, 160), long_spec(67, 48, 64), long_spec(None, distance=96),
])  # fmt: skip


@given(SPECS, st.integers(0, 700), st.integers(1, 700), st.integers(1, 700))
def test_pieces_are_cut_at_every_border_and_nowhere_else(spec: ModelSpec, start: int, length: int, prompt: int):
    pieces = split(spec, start, start + length, prompt)
    assert (pieces[0][0], pieces[-1][1]) == (start, start + length)
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    for first, stop in pieces:
        border = next_cut(spec, first, prompt)
        assert first < stop
        assert border is None or stop <= border
        assert stop == border or stop == start + length
        assert len({is_sparse(spec, row, prompt) for row in range(first, stop)}) == 1 or spec.sparse is None


@given(SPECS, st.integers(1, 700), st.integers(1, 700))
def test_whole_cells_walk_through_a_prompt(spec: ModelSpec, prompt: int, budget: int):
    position = 0
    while is_sparse(spec, position, prompt):
        step = whole_cells(spec, position, budget, prompt)
        inside = split(spec, position, position + step, prompt)
        assert next_cut(spec, inside[-1][0], prompt) == position + step, "the last cell is whole"
        assert step <= budget or len(inside) == 1
        position += step
    assert position in (0, prompt)


@given(SPECS, st.integers(1, 700), st.integers(1, 700))
def test_cells_of_the_stable_prefix_are_those_of_longer_prompts(spec: ModelSpec, prompt: int, longer: int):
    longer += prompt
    if is_sparse(spec, 0, prompt):
        stable = last_cut(spec, prompt, prompt)
        assert split(spec, 0, stable, prompt) == split(spec, 0, stable, longer)
        assert prompt - largest_cell(spec) < stable <= prompt
        assert last_cut(spec, stable, longer) == stable, "the longer one can go on there"
