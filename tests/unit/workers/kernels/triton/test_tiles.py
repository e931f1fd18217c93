"""The choice of tiles on the device against its slow twin."""

from __future__ import annotations

import random

import pytest

from workers.attention.plan import Selection
from workers.bench.cases.paged_cells import CELLS, selections
from workers.bench.cases.selections import random_selection
from workers.kernels.triton import tiles
from workers.kernels.triton.lists import Rows, cell_lists, choose_tiles


@pytest.mark.parametrize("rates", [(10, 7), (1, 1)])
@pytest.mark.parametrize(("start", "rows"), [(cell[0], cell[1]) for cell in CELLS[1:6]] + [(5000, 193), (70000, 8191)])
def test_choices_equal_those_of_the_twin(
    start: int, rows: int, rates: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_BLOCK", 64)
    near = min(start + rows, 3000)  # lists of long contexts stay short
    heads = [Selection.everything(start + rows), *selections(near).values()]
    heads += [random_selection(near, random.Random(seed)) for seed in range(5)]
    offsets, columns = [head.offsets for head in heads], [head.columns for head in heads]
    lists = [cell_lists(offsets, columns, start + rows, tile) for tile in (128, 64)]
    seen = set()
    for some in (lists, lists[:1], lists[1:]):
        own_rates = rates[: len(some)]
        wanted, got = (choose(some, Rows(start, rows), own_rates) for choose in (choose_tiles, tiles.choose_tiles))
        for field, ours, theirs in zip(wanted._fields, got, wanted, strict=True):
            assert ours.dtype == theirs.dtype, field
            assert ours.tolist() == theirs.tolist(), field
        seen |= set(got.head_tiles.tolist())
    assert 0 in seen
    assert start < 1000 or seen == {0, 64, 128}
