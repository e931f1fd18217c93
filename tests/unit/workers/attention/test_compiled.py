"""The compiled attention kernel against the definition in float64: every path, type and kind of plan."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from workers.attention import compiled
from workers.attention.plan import AttentionPlan, Queries, Selection
from workers.bench.cases.attention import attend_reference, tile_pairs
from workers.kernels.abi import Path
from workers.kernels.build import compiler, paths
from workers.kv.paged import LayerKV, PageTable, quantise

CHUNK = 256  # L, tokens between the starts of two DCA chunks


pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@functools.cache
def _paths() -> list[Path]:
    return paths() or list(Path)  # not built: every call fails


@dataclass(frozen=True)
class Case:
    """Rows `start .. start + length - 1` and the cache they meet."""

    start: int
    length: int
    distance: int = 0
    dim: int = 64
    group: int = 2
    page_size: int = 16
    kv_heads: int = 2
    scattered: bool = True
    sparse: bool = False
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None
    tile: int = 64


class Inputs:
    """Random queries and a paged cache with the same keys in order, in float64, for the reference."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        random, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        context, heads = case.start + case.length, case.group * case.kv_heads
        pages = -(-context // case.page_size)
        ids = rng.permutation(pages + 3)[:pages] if case.scattered else np.arange(1, pages + 1)
        self.table = PageTable(case.page_size)
        self.table.append(ids.tolist())
        slots = torch.from_numpy(self.table.slots(np.arange(context)))
        sides, scales, exact = [], [], []
        for _ in range(2):
            rows = torch.randn(case.kv_heads, context, case.dim, generator=random)
            whole = torch.full((case.kv_heads, (pages + 3) * case.page_size, case.dim), torch.nan)
            if case.cache == torch.int8:
                small, scale = quantise(rows)
                whole = torch.full(whole.shape, 77, dtype=torch.int8)
                whole[:, slots] = small
                scales.append(torch.full(whole.shape[:2], torch.nan))
                scales[-1][:, slots] = scale
                exact.append((small.double() * scale.double()[..., None]).transpose(0, 1))
            else:
                whole = whole.to(case.cache or case.dtype)
                whole[:, slots] = rows.to(whole.dtype)
                exact.append(rows.to(whole.dtype).double().transpose(0, 1))
            sides.append(whole)
        self.kv = LayerKV(sides[0], sides[1], *scales)
        self.k, self.v = exact
        wide = torch.randn(case.length, heads + 1, 3 * case.dim, generator=random).to(case.dtype)
        views = [wide[:, 1:, i * case.dim : (i + 1) * case.dim] for i in range(3)]  # odd strides
        regions = 1 if not case.distance else min(3, 1 + case.start // case.distance)
        self.q = Queries(views[0], views[1] if regions > 1 else None, views[2] if regions > 2 else None)
        selections = tuple(_selection(rng, context, i) for i in range(heads)) if case.sparse else None
        self.plan = AttentionPlan(case.start, case.length, case.distance, selections, case.tile)
        self.scales = torch.rand(case.length, generator=random) * case.dim**-0.5 + case.dim**-0.5

    def expected(self) -> torch.Tensor:
        succ, inter = (None if rows is None else rows.double() for rows in (self.q.succ, self.q.inter))
        q = Queries(self.q.intra.double(), succ, inter)
        return attend_reference(q, self.k, self.v, self.plan, self.scales.double())

    def actual(self, path: Path = Path.AMX, visited: torch.Tensor | None = None) -> torch.Tensor:
        return compiled.attend(self.q, self.kv, self.table, self.plan, self.scales, visited=visited, path=path)


def _selection(rng: np.random.Generator, context: int, head: int) -> Selection:
    if head == 0:  # nothing but the diagonal
        return Selection(np.array([[0, 0]], np.int32), np.empty(0, np.int32))
    marks = np.zeros(context + 40, bool)
    marks[: rng.integers(1, 100)] = True
    for start in rng.integers(0, context, size=rng.integers(0, 9)):
        marks[start : start + rng.integers(1, 80)] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([0], marks, [0]))))
    offsets = np.stack((edges[::2], edges[1::2] - 1), axis=1)
    columns = np.unique(rng.integers(0, context, size=rng.integers(1, max(2, context // 3))))
    return Selection(offsets.astype(np.int32), columns.astype(np.int32))


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max().item()
    assert error <= (1e-5 if actual.dtype == torch.float32 else 1.6e-2) * expected.abs().max().item()


def _id(value: object) -> str | None:
    if not isinstance(value, Case):
        return None
    changed = (field.name for field in dataclasses.fields(Case) if getattr(value, field.name) != field.default)
    return "-".join(f"{name}={str(getattr(value, name)).removeprefix('torch.')}" for name in changed)


SIZES = [
    Case(start, length, page_size=page_size, scattered=scattered, group=group, dim=dim)
    for start, length, page_size, scattered, group, dim in (
        (0, 1, 4, True, 1, 64), (0, 17, 4, True, 2, 64), (0, 67, 16, True, 8, 128), (50, 193, 64, False, 2, 128),
        (1000, 1, 16, True, 8, 128), (1009, 17, 64, True, 8, 64), (700, 333, 1, True, 1, 64),
        (0, 1031, 16, False, 2, 64), (5000, 1, 64, True, 8, 128), (4100, 5, 1024, True, 2, 64),
    )
]  # fmt: skip
CHUNKED = [
    Case(start, length, CHUNK, group=group, page_size=page_size)
    for start, length, group, page_size in (
        (CHUNK - 1, 1, 2, 16), (CHUNK, 1, 8, 4), (2 * CHUNK - 1, 1, 1, 64), (2 * CHUNK, 1, 2, 16), (0, 67, 2, 64),
        (CHUNK, CHUNK, 1, 16), (2 * CHUNK - 17, 17, 2, 4), (2 * CHUNK, 193, 2, 16), (3 * CHUNK + 5, 67, 1, 64),
    )
]  # fmt: skip
SPARSE = [dataclasses.replace(case, sparse=True) for case in (*SIZES[1:], *CHUNKED)]
TYPES = [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, torch.int8), (torch.float32, torch.int8)]


@pytest.mark.parametrize(("dtype", "cache"), TYPES, ids=str)
@pytest.mark.parametrize("case", [*SIZES, *CHUNKED, *SPARSE], ids=_id)
def test_equals_the_definition(case: Case, dtype: torch.dtype, cache: torch.dtype | None) -> None:
    inputs = Inputs(dataclasses.replace(case, dtype=dtype, cache=cache))
    expected = inputs.expected()
    pairs = [tile_pairs(inputs.plan, head) for head in range(case.group * case.kv_heads)]
    for path in _paths():
        visited = torch.full((len(pairs),), -1)
        _close(inputs.actual(path, visited), expected)
        assert visited.tolist() == pairs


@pytest.mark.parametrize("dim", [1, 17, 32, 80, 96, 256])
def test_head_dims(dim: int) -> None:
    for sparse in (False, True):
        inputs = Inputs(Case(190, 67, 0, dim, sparse=sparse))
        expected = inputs.expected()
        for path in _paths():
            _close(inputs.actual(path), expected)


@pytest.mark.parametrize("tile", [1, 16, 48, 128])
def test_other_tiles(tile: int) -> None:
    inputs = Inputs(Case(300, 193, CHUNK, tile=tile, sparse=True))
    visited = torch.empty(4, dtype=torch.int64)
    _close(inputs.actual(visited=visited), inputs.expected())
    assert visited.tolist() == [tile_pairs(inputs.plan, head) for head in range(4)]


@pytest.mark.parametrize("length", [1, 67, 600])
def test_threads_do_not_change_the_result(length: int) -> None:
    inputs = Inputs(Case(5000, length, group=8, dim=128))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(inputs.actual())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_error_is_that_of_torch() -> None:
    case = Case(1500, 548, dim=128, group=4, scattered=False)
    inputs = Inputs(case)
    inputs.scales.fill_(case.dim**-0.5)
    expected = inputs.expected()
    mask = torch.arange(2048) <= torch.arange(1500, 2048)[:, None]
    k, v = (side.transpose(0, 1).repeat_interleave(4, dim=0).bfloat16()[None] for side in (inputs.k, inputs.v))
    rows = inputs.q.intra.transpose(0, 1)[None]
    theirs = torch.nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)[0].transpose(0, 1)
    theirs_off = (theirs.double() - expected).abs()
    for path in _paths():
        ours_off = (inputs.actual(path).double() - expected).abs()
        assert ours_off.max() <= 1.5 * theirs_off.max()
        assert ours_off.mean() <= 1.5 * theirs_off.mean()


def test_extreme_logits() -> None:
    inputs = Inputs(Case(700, 67))
    inputs.scales.mul_(60)
    expected = inputs.expected()
    for path in _paths():
        _close(inputs.actual(path), expected)


def test_rows_without_keys_are_zero_and_torch_still_works_after_a_call() -> None:
    inputs = Inputs(Case(100, 17))
    nothing = Selection(np.empty((0, 2), np.int32), np.empty(0, np.int32))
    plan = dataclasses.replace(inputs.plan, heads=(nothing,) * 4)
    left = torch.randn(64, 64).bfloat16()
    before = left @ left  # oneDNN configures the same tiles
    assert not compiled.attend(inputs.q, inputs.kv, inputs.table, plan, inputs.scales).any()
    assert torch.equal(left @ left, before)


def test_damage_stays_visible() -> None:
    inputs = Inputs(Case(100, 17, page_size=4, scattered=False))
    inputs.kv.values[0, 50] = torch.nan
    out = inputs.actual()
    assert out[:, :2].isnan().all()
    assert not out[:, 2:].isnan().any()


def test_refusals() -> None:
    inputs = Inputs(Case(100, 17))
    q, kv, table, plan, scales = inputs.q, inputs.kv, inputs.table, inputs.plan, inputs.scales
    bad_selection = (Selection(np.array([[5, 3]], np.int32), np.empty(0, np.int32)),) * 4
    calls = [
        (q, kv, table, dataclasses.replace(plan, start=200), scales),
        (q, kv, table, dataclasses.replace(plan, heads=bad_selection), scales),
        (q, kv, table, dataclasses.replace(plan, heads=bad_selection[:1]), scales),
        (q, kv, table, dataclasses.replace(plan, length=16), scales),
        (q, kv, table, dataclasses.replace(plan, distance=50, start=100), scales),
        (q, kv, table, plan, scales.double()),
        (q, LayerKV(kv.keys[:, :50], kv.values), table, plan, scales),
        (q, LayerKV(kv.keys[..., :32], kv.values[..., :32]), table, plan, scales),
        (q, LayerKV(kv.keys.to(torch.int8), kv.values.to(torch.int8)), table, plan, scales),
        (Queries(q.intra.transpose(1, 2)), kv, table, plan, scales),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^attention kernel"):
            compiled.attend(*call)


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_types_that_are_taken(dtype: torch.dtype, taken: bool) -> None:
    kv = LayerKV(*torch.zeros(2, 1, 16, 32, dtype=dtype))
    for query in (torch.float32, torch.bfloat16):
        assert compiled.supports(torch.zeros(1, 1, 32, dtype=query), kv) == taken
