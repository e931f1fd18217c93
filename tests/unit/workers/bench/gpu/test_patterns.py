"""Stated patterns: equal budgets, and what stands in place of a selection."""

from __future__ import annotations

import numpy as np
import torch

from workers.bench.gpu.context import Sizes
from workers.bench.gpu.patterns import StatedKept, patterns
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.sparse.selection import to_intervals


def test_all_patterns_keep_as_many_pairs_and_differ_in_their_runs() -> None:
    sizes = Sizes()
    four = patterns(sizes)
    assert [(one.near, one.run) for one in four] == [(16_384, 256), (8192, 64), (8192, 16), (4096, 1)]
    assert four[0].name == "nearest 16384 and 28 runs of 256, 17408 columns"
    stops = 4096, 131_072
    tables = CellTables.make([CellSpan(0, stop, ((0, stop, 0),)) for stop in stops], 64, TileShape(), "cpu")
    for one in four:
        kept = StatedKept(one, tables, 2, seed=1)
        assert kept.totals[0].tolist() == [[4096, 4096], [sizes.offsets] * 2]
        assert kept.totals[1].tolist() == [[4096, 4096], [sizes.columns] * 2]
        bits = np.unpackbits(kept.offset_words.numpy().view(np.uint8), axis=-1, bitorder="little")
        assert (bits.sum(-1) == kept.totals[0].numpy()).all()
        intervals = to_intervals(np.flatnonzero(bits[1, 0]).astype(np.int32))
        assert intervals[0, 0] == 0
        assert intervals[0, 1] >= one.near - 1
        assert ((intervals[1:, 1] - intervals[1:, 0] + 1) % one.run == 0).all()
        assert (bits[1, 0] != bits[1, 1]).any(), "heads differ"
        listed = kept.columns[1, 1].tolist()
        assert listed == sorted(set(listed))
        bits = np.unpackbits(kept.column_words.numpy().view(np.uint8), axis=-1, bitorder="little")
        assert np.flatnonzero(bits[1, 1]).tolist() == listed


def test_masses_are_those_of_the_selection() -> None:
    tables = CellTables.make([CellSpan(0, 500, ((0, 500, 0),))], 64, TileShape(), "cpu")
    kept = StatedKept(patterns(Sizes())[0], tables, 3)
    like = kept.columns_as()
    like.masses.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    assert kept.offsets_as(like).masses.tolist() == [[1.0, 2.0, 3.0]]
    assert kept.columns_as(like).indices is kept.columns
