"""Paged flash attention against its definition; slots of other sequences hold NaN, so that reading one shows."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from protos.model.spec import DualChunkSpec, RopeSpec
from tests.support.data.dual_chunk import pairwise_attention, relative_positions
from workers.attention import torch_backend
from workers.attention.attend import attend
from workers.attention.plan import AttentionPlan, Queries, Rotation, Selection
from workers.bench.cases.attention import UNVISITED, attend_reference, plan_tags
from workers.bench.cases.selections import random_selection
from workers.kv.paged import LayerKV, PageTable, quantise
from workers.model.rope import Rotary, norm_and_rotate_

SIZES = (1, 17, 67, 193, 256, 1000)
STARTS = (0, 1, 63, 64, 65, 499)
PAGES = (1, 16, 64)
HEADS = ((4, 2), (4, 4), (8, 1))
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2}
DIM = 32


class Paged:
    """Random keys and values of one sequence, paged and as plain tensors."""

    def __init__(self, context: int, kv_heads: int, page_size: int, layout: str, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        k, v = torch.randn(2, context, kv_heads, DIM).to(dtype)
        self.put(k, v, page_size, layout, seed)

    def put(self, k: torch.Tensor, v: torch.Tensor, page_size: int, layout: str, seed: int) -> None:
        count = -(-len(k) // page_size)
        self.k, self.v = k, v
        self.table = PageTable(page_size)
        self.table.append(page_ids(count, layout, random.Random(seed)))
        self._slots = max(run.first + run.length for run in self.table.runs(0, count * page_size)) + page_size
        self.kv = LayerKV(self.paged(k), self.paged(v))

    def paged(self, rows: torch.Tensor) -> torch.Tensor:
        """`[S, K, ...]` in pages; slots that belong to nobody hold NaN, or what that is in integers."""
        cache = torch.full((rows.shape[1], self._slots, *rows.shape[2:]), 99 if rows.dtype == torch.int8 else torch.nan)
        cache = cache.to(rows.dtype)
        row = 0
        for first, length in self.table.runs(0, len(rows)):
            cache[:, first : first + length] = rows[row : row + length].transpose(0, 1)
            row += length
        return cache

    def check(self, heads: int, plan: AttentionPlan, scales: torch.Tensor | None = None) -> None:
        q = random_queries(heads, plan, self.k.dtype)
        scales = torch.full((plan.length,), DIM**-0.5) if scales is None else scales
        got = torch_backend.attend(q, self.kv, self.table, plan, scales)
        wanted = attend_reference(q, self.k, self.v, plan, scales)
        assert got.dtype == q.intra.dtype
        tolerance = TOLERANCE[q.intra.dtype]
        torch.testing.assert_close(got.float(), wanted, atol=tolerance, rtol=tolerance)


def random_queries(heads: int, plan: AttentionPlan, dtype: torch.dtype) -> Queries:
    """Unrelated rows for every region, so that meeting the wrong one shows; strided as slices of a product are."""
    found = {tag: torch.randn(plan.length, heads + 3, DIM).to(dtype)[:, :heads] for _, _, tag in plan.regions}
    return Queries(found[Rotation.INTRA], found.get(Rotation.SUCC), found.get(Rotation.INTER))


def page_ids(count: int, layout: str, rng: random.Random) -> list[int]:
    if layout == "contiguous":
        return list(range(3, 3 + count))
    if layout == "shuffled":
        return rng.sample(range(2 * count + 1), count)
    ids, at = [], 0  # fragmented: ascending runs of different lengths with gaps
    while len(ids) < count:
        at += rng.randint(1, 3)
        length = min(rng.choice((1, 2, 5, 11)), count - len(ids))
        ids.extend(range(at, at + length))
        at += length
    return ids


@pytest.fixture(params=["default limits", "small limits"])
def _limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits let views, full gather buffers and left-over fragments all occur in short contexts."""
    if request.param == "small limits":
        monkeypatch.setattr(torch_backend, "MIN_VIEW_TOKENS", 32)
        monkeypatch.setattr(torch_backend, "FRAGMENT_TOKENS", 80)


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "fragmented", "shuffled"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda pair: f"{pair[0]}/{pair[1]}")
@pytest.mark.slow
def test_dense_attention_equals_its_definition(heads: tuple[int, int], layout: str, dtype: torch.dtype):
    for number, (rows, start) in enumerate((rows, start) for rows in SIZES for start in STARTS):
        if rows == 1000 and start not in (0, 499):
            continue  # the slow ones
        page_size = PAGES[number % len(PAGES)]
        paged = Paged(start + rows, heads[1], page_size, layout, dtype, number)
        paged.check(heads[0], AttentionPlan(start, rows))


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("most", [1, 16, 64, 65])
@pytest.mark.parametrize("layout", ["contiguous", "fragmented", "shuffled"])
def test_more_rows_than_one_kernel_call_takes(layout: str, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_backend, "DENSE_ROWS", most)
    for rows, start, page_size in ((most, 7, 16), (most + 1, 64, 16), (130, 65, 64), (131, 0, 1)):
        Paged(start + rows, 2, page_size, layout, torch.float32, rows).check(4, AttentionPlan(start, rows))


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("layout", ["contiguous", "fragmented", "shuffled"])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 499, 2003])
def test_decode_rows(start: int, layout: str):
    for heads, kv_heads in HEADS:
        Paged(start + 1, kv_heads, 16, layout, torch.float32, start).check(heads, AttentionPlan(start, 1))


DISTANCE = 64
BORDERS = [(0, 64), (63, 1), (64, 1), (64, 17), (127, 1), (128, 1), (128, 64), (130, 61), (448, 64), (455, 1)]


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "shuffled"])
@pytest.mark.parametrize(("start", "rows"), BORDERS)
def test_regions_of_dual_chunk_attention(start: int, rows: int, layout: str, dtype: torch.dtype):
    for heads, kv_heads in HEADS:
        paged = Paged(start + rows, kv_heads, 16, layout, dtype, start)
        paged.check(heads, AttentionPlan(start, rows, DISTANCE))


@pytest.mark.parametrize(("chunk_size", "local_size"), [(96, 32), (96, 1), (97, 60), (64, 63)])
@pytest.mark.parametrize("start", [0, 31, 64, 127, 129, 300])
def test_dual_chunk_attention_equals_its_definition(start: int, chunk_size: int, local_size: int):
    """Rotations, plan and kernel together against pair by pair arithmetic; the plan's own borders are not used."""
    dual = DualChunkSpec(chunk_size, local_size)
    rope = RopeSpec(1e4)
    rotary = Rotary(rope, DIM, dual_chunk=dual)
    rows = min(17, dual.distance - start % dual.distance)
    positions = torch.arange(start, start + rows)
    paged = Paged(start + rows, 2, 16, "shuffled", torch.float32, start)
    q, raw = torch.randn(rows, 4, DIM), paged.k
    keys = norm_and_rotate_(raw.clone(), rotary.rotations(torch.arange(start + rows))[Rotation.INTRA])
    paged.put(keys, paged.v, 16, "shuffled", start)
    rotations = rotary.rotations(positions, list(Rotation))
    turned = Queries(*(norm_and_rotate_(q.clone(), one) for one in rotations.values()))
    scales = torch.full((rows,), DIM**-0.5)
    got = attend(turned, paged.kv, paged.table, AttentionPlan(start, rows, dual.distance), scales)
    relative = relative_positions(positions, torch.arange(start + rows), chunk_size, local_size)
    inv_freq = 1e4 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    wanted = pairwise_attention(q, raw, paged.v, relative, inv_freq, scales)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("start", "rows"), [(0, 17), (0, 193), (64, 67), (300, 193), (1000, 1)])
@pytest.mark.parametrize("distance", [0, 500])
def test_selected_keys(distance: int, start: int, rows: int, dtype: torch.dtype):
    rng = random.Random(start + rows)
    heads = (*(random_selection(start + rows, rng) for _ in range(3)), Selection.everything(start + rows))
    paged = Paged(start + rows, 2, 16, "shuffled", dtype, rows)
    paged.check(4, AttentionPlan(start, rows, distance, heads))


NEAR = Selection(np.array([[0, 40], [90, 91]], np.int32), np.arange(7, dtype=np.int32))


@pytest.mark.parametrize("heads", [None, (NEAR,)])
@pytest.mark.parametrize("length", [1, 67])
def test_rows_of_different_scales(length: int, heads: tuple[Selection, ...] | None):
    paged = Paged(300, 1, 16, "fragmented", torch.float32, 3)
    paged.check(1, AttentionPlan(300 - length, length, 0, heads), torch.linspace(0.1, 0.4, length))


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("cache", "compute"), [
    (torch.int8, torch.float32), (torch.int8, torch.bfloat16), (torch.bfloat16, torch.float32),
])  # fmt: skip
def test_a_cache_of_another_type_is_converted(cache: torch.dtype, compute: torch.dtype, sparse: bool):
    paged = Paged(400, 2, 16, "fragmented", torch.float32, 8)
    if cache == torch.int8:
        (k, key_scales), (v, value_scales) = quantise(paged.k), quantise(paged.v)
        paged.kv = LayerKV(*(paged.paged(side) for side in (k, v, key_scales, value_scales)))
        k, v = k * key_scales[..., None], v * value_scales[..., None]
    else:
        k, v = paged.k.bfloat16(), paged.v.bfloat16()
        paged.kv = LayerKV(paged.paged(k), paged.paged(v))
    rng = random.Random(1)
    heads = tuple(random_selection(400, rng) for _ in range(4)) if sparse else None
    plan = AttentionPlan(384, 16, 128, heads)
    q, scales = random_queries(4, plan, compute), torch.full((16,), DIM**-0.5)
    got = torch_backend.attend(q, paged.kv, paged.table, plan, scales)
    wanted = attend_reference(q, k, v, plan, scales)
    tolerance = TOLERANCE[compute]
    torch.testing.assert_close(got.float(), wanted.float(), atol=tolerance, rtol=tolerance)


def test_only_selected_keys_are_read():
    heads = (Selection(np.array([[0, 63], [150, 160]], np.int32), np.array([3, 9, 299], np.int32)),)
    plan = AttentionPlan(264, 36, 0, heads)
    paged = Paged(300, 1, 16, "shuffled", torch.float32, 5)
    unread = set(range(300)) - set((plan_tags(plan, 0, 300) != UNVISITED).any(0).nonzero()[:, 0].tolist())
    assert len(unread) > 100
    paged.kv.keys[:, paged.table.slots(np.array(sorted(unread)))] = torch.nan
    paged.check(1, plan)


@pytest.fixture
def kernel_inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    real = torch_backend.flash

    def kernel(q, k, v, causal, scale):
        seen.extend((k, v))
        return real(q, k, v, causal, scale)

    monkeypatch.setattr(torch_backend, "flash", kernel)
    return seen


@pytest.mark.parametrize(("rows", "start"), [(1, 4999), (64, 4936), (256, 0)])
def test_a_contiguous_context_is_never_copied(rows: int, start: int, kernel_inputs: list[torch.Tensor]):
    paged = Paged(start + rows, 2, 16, "contiguous", torch.float32, 1)
    paged.check(4, AttentionPlan(start, rows))
    caches = {paged.kv.keys.untyped_storage().data_ptr(), paged.kv.values.untyped_storage().data_ptr()}
    assert kernel_inputs
    assert {tensor.untyped_storage().data_ptr() for tensor in kernel_inputs} == caches


def test_gathers_of_fragments_stay_below_their_limit(kernel_inputs: list[torch.Tensor]):
    paged = Paged(20_000, 1, 16, "shuffled", torch.float32, 1)
    paged.check(2, AttentionPlan(19_999, 1))
    caches = {paged.kv.keys.untyped_storage().data_ptr(), paged.kv.values.untyped_storage().data_ptr()}
    gathered = [t.shape[1] for t in kernel_inputs if t.untyped_storage().data_ptr() not in caches]
    assert len(gathered) >= 8
    assert max(gathered) <= torch_backend.FRAGMENT_TOKENS


def test_the_reference_is_softmax_attention():
    q, k, v = torch.randn(3, 5, 2, DIM, dtype=torch.float64)
    got = attend_reference(Queries(q), k, v, AttentionPlan(0, 5), torch.full((5,), 0.3))
    assert got.dtype == torch.float64
    scale = float(torch.tensor(0.3))
    for row in range(5):
        for head in range(2):
            weights = torch.softmax(k[: row + 1, head] @ q[row, head] * scale, 0)
            torch.testing.assert_close(got[row, head], weights @ v[: row + 1, head])
