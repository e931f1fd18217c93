"""Selections from sums: the largest scores, intervals of offsets, and the synthetic load."""

from __future__ import annotations

import numpy as np
import pytest

from workers.sparse.selection import offset_mask, synthetic_selection, to_intervals, top_indices


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
def test_top_indices(scores: list[float], count: int, always: int, expected: list[int]) -> None:
    assert top_indices(np.array([scores], np.float32), [count], always)[0].tolist() == expected


@pytest.mark.parametrize(
    ("indices", "expected"), [([], []), ([3], [[3, 3]]), ([0, 1, 2, 4, 6, 7], [[0, 2], [4, 4], [6, 7]])]
)
def test_to_intervals(indices: list[int], expected: list[list[int]]) -> None:
    assert to_intervals(np.array(indices, np.int32)).tolist() == expected


def test_synthetic_selection_depends_on_the_cell_layer_and_head_only() -> None:
    one, again = (synthetic_selection(100_000, (8192, 3, 1)) for _ in range(2))
    assert one.columns.tolist() == again.columns.tolist()
    assert one.offsets.tolist() == again.offsets.tolist()
    assert len(set(one.columns.tolist())) == 1024
    assert one.offsets[0].tolist() == [0, 1535]
    assert (np.diff(one.offsets, axis=1) >= 63).all()
    for other in ((0, 3, 1), (8192, 2, 1), (8192, 3, 0)):
        assert synthetic_selection(100_000, other).columns.tolist() != one.columns.tolist()
    assert synthetic_selection(10, (0, 0, 0)).offsets.tolist() == [[0, 9]]


@pytest.mark.parametrize("stop", [1, 17, 63, 65, 1600, 1700, 3000, 100_000])
def test_synthetic_offsets_are_the_nearest_and_eight_runs(stop: int) -> None:
    for head in range(20):
        kept = np.zeros(stop, np.bool_)
        kept[:1536] = True
        for start in np.random.default_rng((0, 0, head)).integers(0, max(1, stop - 63), 8).tolist():
            kept[start : start + 64] = True
        found = synthetic_selection(stop, (0, 0, head))
        assert np.array_equal(offset_mask(found, stop), kept)
        assert np.array_equal(found.offsets, to_intervals(np.flatnonzero(kept).astype(np.int32)))
