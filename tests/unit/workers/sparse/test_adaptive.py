"""The search for a short list of columns and offsets that keeps a given mass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from workers.attention.plan import Selection
from workers.sparse import adaptive
from workers.sparse.adaptive import AdaptiveSearch, PatchedArray
from workers.sparse.selection import FloatArray, offset_mask

NewMass = tuple[float, PatchedArray, PatchedArray]  # of the forced selection, of columns, of offsets


def new_mass(base: float, columns: FloatArray, offsets: FloatArray) -> NewMass:
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return base, PatchedArray(columns, *nothing), PatchedArray(offsets, *nothing)


def search(mass: NewMass, goal: float, kept: Callable[[Selection], float]) -> Selection:
    found = AdaptiveSearch(*mass, goal)
    while not found.done:
        found.update(kept(found.selection))
    return found.selection


@pytest.mark.parametrize(("share", "beyond"), [(1.0, 0.01), (0.9, 0.07), (0.3, 0.35)])
def test_adaptive_lists_are_not_much_longer_than_they_must_be(share: float, beyond: float) -> None:
    random = np.random.default_rng(0)
    columns, offsets = (random.exponential(size=700).astype(np.float32) for _ in range(2))

    def kept(one: Selection) -> float:  # the rest of every column is kept by offsets too
        near = offset_mask(one, 700)[128:]
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
        found = AdaptiveSearch(*new_mass(3.0, columns, offsets), 3 + part * total).selection
        taken, kept = [], 3.0
        while kept < 3 + part * total - 1e-6:
            kept += candidates[len(taken)][3]
            taken.append(candidates[len(taken)][1:3])
        assert set(found.columns.tolist()) == {at for kind, at in taken if kind == 0} | set(range(30))
        near = {at // 64 for at in np.flatnonzero(offset_mask(found, stop)).tolist()}
        assert near == {at for kind, at in taken if kind == 1} | {0, 1}


def test_adaptive_prefers_diagonals_where_the_mass_is_there() -> None:
    columns, offsets = np.full(1024, 0.001, np.float32), np.full(1024, 0.001, np.float32)
    offsets[640:704] = 1.0
    columns[500] = 2.0
    new = new_mass(5, columns, offsets)
    found = search(new, 60, lambda one: 60 if len(one.offsets) > 1 else 5)
    assert found.offsets.tolist() == [[0, 127], [640, 703]]
    assert found.columns.tolist() == [*range(30), 500]
