"""Thresholds and compaction against the selection in NumPy: the same indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.kernels.triton.sparse.selection import compact, kept_masses, thresholds
from workers.sparse.selection import FloatArray, top_indices

STOPS = (17, 193, 600)
COUNTS = (0, 41, 117, 10**6)


def scores_of(kind: str, stop: int, random: np.random.Generator) -> FloatArray:
    size = len(COUNTS), stop
    found = {
        "many orders of magnitude": random.exponential(size=size) ** 9,
        "ties": random.integers(0, 3, size).astype(float),
        "zeros": np.zeros(size),
        "NaN": np.where(random.random(size) < 0.1, np.nan, random.random(size)),
    }[kind]
    return found.astype(np.float32)


@pytest.mark.parametrize(("kind", "forced"), [
    ("many orders of magnitude", 0), ("many orders of magnitude", 100), ("ties", 30), ("zeros", 30), ("NaN", 0),
])  # fmt: skip
def test_the_largest_scores(kind: str, forced: int) -> None:
    random = np.random.default_rng(7)
    tables = CellTables.make([CellSpan(0, stop, ((0, stop, 0),)) for stop in STOPS], 16, TileShape(), "cpu")
    parts = [scores_of(kind, stop, random) for stop in STOPS]
    scores = torch.zeros(len(STOPS), len(COUNTS), tables.width)
    for at, part in enumerate(parts):
        scores[at, :, : part.shape[1]] = torch.from_numpy(part)
    counts = torch.tensor([COUNTS] * len(STOPS), dtype=torch.int32)
    found = thresholds(scores, counts, forced, tables, block=512)
    kept = compact(scores, found, forced, tables, room=tables.width, block=512)
    assert kept.indices is not None
    bits = np.unpackbits(kept.words.numpy().view(np.uint8), axis=-1, bitorder="little")
    for at, part in enumerate(parts):
        for head, expected in enumerate(top_indices(part, COUNTS, forced)):
            assert kept.totals[at, head] == len(expected)
            assert kept.indices[at, head, : len(expected)].tolist() == expected.tolist()
            assert np.flatnonzero(bits[at, head]).tolist() == expected.tolist()
            mass = part[head, expected].sum(dtype=np.float64)
            assert kept.masses[at, head] == pytest.approx(mass, rel=1e-5, nan_ok=True)
    if kind != "NaN":
        torch.testing.assert_close(kept_masses(kept.words, scores, block=256), kept.masses)


def test_columns_beyond_the_room_are_dropped() -> None:
    tables = CellTables.make([CellSpan(0, 67, ((0, 67, 0),))], 16, TileShape(), "cpu")
    scores = torch.arange(128.0).repeat(1, 1, 1)
    found = thresholds(scores, torch.tensor([[20]], dtype=torch.int32), 0, tables, block=256)
    kept = compact(scores, found, 0, tables, room=5, block=256)
    assert kept.indices is not None
    assert kept.indices.tolist() == [[[47, 48, 49, 50, 51]]]
    assert kept.totals.tolist() == [[20]]
