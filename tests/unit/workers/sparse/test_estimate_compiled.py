"""The compiled estimate against the one in PyTorch: every path of this CPU, every type, sizes multiples of nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from protos.model.spec import HeadBudget
from workers.attention.plan import Selection
from workers.bench.cases.sparse_cells import Shape, random_cell
from workers.kernels import build
from workers.kernels.abi import Path
from workers.sparse import selection, vertical_slash
from workers.sparse.estimate import Estimate
from workers.sparse.estimate_compiled import CompiledEstimate

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

TYPES = [
    (torch.float32, None), (torch.float32, torch.int8), (torch.float32, torch.bfloat16),
    (torch.bfloat16, None), (torch.bfloat16, torch.int8), (torch.bfloat16, torch.float32),
]  # fmt: skip
SHAPES = {
    "one row": Shape(0, 1),
    "first cell": Shape(0, 67, last_q=17, page_size=64),
    "17 rows": Shape(256, 17, page_size=128),
    "64 rows": Shape(320, 192, page_size=64),
    "193 rows": Shape(224, 193, last_q=193, page_size=32, heads=3, kv_heads=1),
    "dca borders": Shape(480, 67, distance=160, page_size=16, heads=2, kv_heads=1),
    "dca, two chunks": Shape(160, 113, distance=160, page_size=32, last_q=48),
    "several chunks": Shape(8192, 65, page_size=1024, heads=2, kv_heads=1),
}


def paths(shape: Shape) -> list[Path]:
    """The paths of this CPU that take the types and head dim of a shape."""
    is_bf16 = shape.dtype == torch.bfloat16 and shape.cache != torch.float32 and shape.dim % 32 == 0
    found = build.paths()
    return [path for path in found if path <= Path.AVX512 or is_bf16] if found else list(Path)


def some_selections(stop: int, heads: int, seed: int = 0) -> list[Selection]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(heads):
        offsets, columns = (np.flatnonzero(random.random(stop) < share).astype(np.int32) for share in (0.4, 0.3))
        found.append(Selection(selection.to_intervals(offsets), columns))
    return found


def check(shape: Shape) -> None:
    cell = random_cell(shape)
    stop, group = cell.keys.stop, shape.heads // shape.kv_heads
    selections = some_selections(stop, group)
    lone: list[Selection | None] = [None, *selections[1:]]
    for kv_head in range(shape.kv_heads):
        sampled, held_out = ((rows, cell.keys, kv_head) for rows in (cell.queries.estimate, cell.queries.held_out))
        expected = Estimate(*sampled).sums()
        kept = [Estimate(*each).kept_share(selections) for each in (sampled, held_out)]
        total = Estimate(*sampled).kept_mass(expected, lone)
        for path in paths(shape):
            found = CompiledEstimate(*sampled, path).sums()
            np.testing.assert_allclose(found.columns, expected.columns, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.offsets, expected.offsets, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5, atol=1e-5)
            for each, share in zip((sampled, held_out), kept, strict=True):
                np.testing.assert_allclose(CompiledEstimate(*each, path).kept_share(selections), share, atol=1e-5)
            mass = CompiledEstimate(*sampled, path).kept_mass(expected, lone)
            np.testing.assert_allclose(mass, total, rtol=1e-5, atol=1e-5)
            assert mass[0] == 0


@pytest.mark.parametrize(("dtype", "cache"), TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_estimate_equals_pytorch(name: str, dtype: torch.dtype, cache: torch.dtype | None) -> None:
    check(replace(SHAPES[name], dtype=dtype, cache=cache))


@pytest.mark.parametrize("dim", [16, 80, 96, 128])
def test_head_dims(dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(Shape(192, 67, page_size=64, dim=dim, dtype=dtype))


def test_rows_with_large_logits_stay_finite() -> None:
    cell = random_cell(Shape(192, 67, last_q=33, dtype=torch.bfloat16, page_size=64))
    sample = replace(cell.queries.estimate, scales=cell.queries.estimate.scales * 100)
    expected = Estimate(sample, cell.keys, 1).sums()
    for path in paths(Shape(0, 1, dtype=torch.bfloat16)):
        found = CompiledEstimate(sample, cell.keys, 1, path).sums()
        np.testing.assert_allclose(found.columns, expected.columns, atol=1e-3)
        np.testing.assert_allclose(found.columns.sum(axis=1), 33, rtol=1e-4)


def test_results_do_not_depend_on_threads() -> None:
    cell = random_cell(Shape(8192, 67, page_size=64, dtype=torch.bfloat16))
    before, found = torch.get_num_threads(), []
    selections = some_selections(cell.keys.stop, 2)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = CompiledEstimate(cell.queries.estimate, cell.keys, 1).sums()
            kept = CompiledEstimate(cell.queries.held_out, cell.keys, 1).kept_share(selections)
            found.append([sums.columns.tobytes(), sums.offsets.tobytes(), sums.lse.tobytes(), kept.tobytes()])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("size", [1, 17, 67, 193, 5000])
def test_top_indices_equal_numpy(size: int) -> None:
    random = np.random.default_rng(size)
    scores = np.stack([
        random.exponential(size=size),
        random.integers(0, 4, size),  # ties
        np.zeros(size),
        np.where(random.random(size) < 0.1, np.nan, random.random(size)),
        random.random(size) * 1e-42,
    ]).astype(np.float32)  # fmt: skip
    for counts in ([0, 1, size // 3, size - 1, size], [size + 1] * 5, [1] * 5, [size // 2, 30, 31, 99, 7]):
        for forced in (0, 1, 30):
            found = CompiledEstimate.top_indices(scores, counts, forced)
            for mine, theirs in zip(found, selection.top_indices(scores, counts, forced), strict=True):
                assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("spec", [{"uniform": HeadBudget(60, 150)}, {"target_recall": 0.9}, {"synthetic": True}])
def test_choose_equals_pytorch(spec: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = random_cell(Shape(1024, 193, page_size=64, heads=4, kv_heads=2))
    assert vertical_slash._backend(cell.queries, cell.keys) is CompiledEstimate
    found = vertical_slash.choose(*cell.args(**spec))
    monkeypatch.setattr(vertical_slash, "_backend", lambda *_: Estimate)
    expected = vertical_slash.choose(*cell.args(**spec))
    np.testing.assert_allclose(found.estimated_recall, expected.estimated_recall, atol=1e-4)
    np.testing.assert_allclose(found.held_out_recall, expected.held_out_recall, atol=1e-3)
    for mine, theirs in zip(found.selections, expected.selections, strict=True):
        changed = set(mine.columns.tolist()) ^ set(theirs.columns.tolist())
        assert len(changed) <= 2  # sums that are equal but for rounding
