"""Paged flash attention against its definition; slots of other sequences hold NaN, so that reading one shows."""

import random
from collections.abc import Iterator

import pytest
import torch

from workers.attention import flash
from workers.attention.plan import AttentionPlan, KeyRange, QueryTile, dense_plan
from workers.attention.reference import attend_reference, plan_mask
from workers.kv_cache import BlockTable

SIZES = (1, 17, 67, 193, 256, 1000)
STARTS = (0, 1, 63, 64, 65, 499)
PAGES = (1, 16, 64)
HEADS = ((4, 2), (4, 4), (8, 1))
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2}
DIM = 32


class Paged:
    """Random keys and values of one sequence, paged and as plain tensors."""

    def __init__(self, context: int, kv_heads: int, page: int, layout: str, dtype: torch.dtype, seed: int) -> None:
        rng = random.Random(seed)
        count = -(-context // page)
        self.table = BlockTable(page)
        self.table.append(block_ids(count, layout, rng))
        highest = max(run.first + run.length for run in self.table.runs(0, count * page))
        torch.manual_seed(seed)
        self.k = torch.randn(context, kv_heads, DIM).to(dtype)
        self.v = torch.randn(context, kv_heads, DIM).to(dtype)
        self.keys = torch.full((kv_heads, highest + page, DIM), torch.nan, dtype=dtype)
        self.values = self.keys.clone()
        row = 0
        for first, length in self.table.runs(0, context):
            self.keys[:, first : first + length] = self.k[row : row + length].transpose(0, 1)
            self.values[:, first : first + length] = self.v[row : row + length].transpose(0, 1)
            row += length

    def check(self, rows: int, start: int, heads: int, plan: AttentionPlan) -> None:
        q = torch.randn(rows, heads, DIM).to(self.k.dtype)
        scale = DIM**-0.5
        got = flash.attend(q, self.keys, self.values, self.table, plan, scale)
        wanted = attend_reference(q, self.k, self.v, start, plan, scale)
        assert got.dtype == q.dtype
        tolerance = TOLERANCE[q.dtype]
        torch.testing.assert_close(got.float(), wanted, atol=tolerance, rtol=tolerance)


def block_ids(count: int, layout: str, rng: random.Random) -> list[int]:
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
        monkeypatch.setattr(flash, "MIN_VIEW_TOKENS", 32)
        monkeypatch.setattr(flash, "FRAGMENT_TOKENS", 80)


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "fragmented", "shuffled"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda pair: f"{pair[0]}/{pair[1]}")
def test_dense_attention_equals_its_definition(heads: tuple[int, int], layout: str, dtype: torch.dtype):
    for number, (rows, start) in enumerate((rows, start) for rows in SIZES for start in STARTS):
        if rows == 1000 and start not in (0, 499):
            continue  # the slow ones
        page = PAGES[number % len(PAGES)]
        paged = Paged(start + rows, heads[1], page, layout, dtype, number)
        paged.check(rows, start, heads[0], dense_plan(start, rows))


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("tile", [1, 16, 64, 65])
@pytest.mark.parametrize("layout", ["contiguous", "fragmented", "shuffled"])
def test_tiles_smaller_than_the_slice(layout: str, tile: int):
    for rows, start, page in ((tile, 7, 16), (tile + 1, 64, 16), (130, 65, 64), (131, 0, 1)):
        paged = Paged(start + rows, 2, page, layout, torch.float32, rows)
        paged.check(rows, start, 4, dense_plan(start, rows, tile))


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("layout", ["contiguous", "fragmented", "shuffled"])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 499, 2003])
def test_decode_rows(start: int, layout: str):
    for heads, kv_heads in HEADS:
        paged = Paged(start + 1, kv_heads, 16, layout, torch.float32, start)
        paged.check(1, start, heads, dense_plan(start, 1))


def test_sparse_plans_read_only_what_they_name():
    paged = Paged(300, 2, 16, "shuffled", torch.float32, 5)
    tiles = (
        QueryTile(0, 64, (KeyRange(0, 16), KeyRange(100, 137), KeyRange(200, 264, causal=True))),
        QueryTile(64, 100, (KeyRange(3, 4), KeyRange(264, 300, causal=True))),
    )
    unread = [*range(16, 100), *range(137, 200)]
    gone = [slot for p in unread for slot in [paged.table.runs(p, p + 1)[0].first]]
    paged.keys[:, gone] = torch.nan
    paged.check(100, 200, 4, AttentionPlan(tiles))


@pytest.fixture
def kernel_inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    real = flash._kernel

    def kernel(q, k, v, causal, scale):
        seen.extend((k, v))
        return real(q, k, v, causal, scale)

    monkeypatch.setattr(flash, "_kernel", kernel)
    return seen


@pytest.mark.parametrize(("rows", "start"), [(1, 4999), (64, 4936), (256, 0)])
def test_a_contiguous_context_is_never_copied(rows: int, start: int, kernel_inputs: list[torch.Tensor]):
    paged = Paged(start + rows, 2, 16, "contiguous", torch.float32, 1)
    paged.check(rows, start, 4, dense_plan(start, rows))
    caches = {paged.keys.untyped_storage().data_ptr(), paged.values.untyped_storage().data_ptr()}
    assert kernel_inputs
    assert {tensor.untyped_storage().data_ptr() for tensor in kernel_inputs} == caches


def test_gathers_of_fragments_stay_below_their_limit(kernel_inputs: list[torch.Tensor]):
    paged = Paged(20_000, 1, 16, "shuffled", torch.float32, 1)
    paged.check(1, 19_999, 2, dense_plan(19_999, 1))
    caches = {paged.keys.untyped_storage().data_ptr(), paged.values.untyped_storage().data_ptr()}
    gathered = [t.shape[2] for t in kernel_inputs if t.untyped_storage().data_ptr() not in caches]
    assert len(gathered) >= 8
    assert max(gathered) <= flash.FRAGMENT_TOKENS


@pytest.mark.parametrize("tile", [1, 16, 67, 4096])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 67), (1, 66), (64, 64), (65, 131)])
def test_a_dense_plan_is_the_causal_mask(start: int, rows: int, tile: int):
    plan = dense_plan(start, rows, tile)
    mask = plan_mask(plan, rows, start + rows, start)
    causal = torch.ones(rows, start + rows, dtype=torch.bool).tril(start)
    assert torch.equal(mask, causal)
    assert plan.visited_pairs == int(causal.sum())
    assert [row for part in plan.tiles for row in range(part.start, part.stop)] == list(range(rows))
    assert max(part.stop - part.start for part in plan.tiles) <= tile


def test_the_mask_of_a_sparse_plan():
    plan = AttentionPlan((QueryTile(0, 2, (KeyRange(0, 1), KeyRange(3, 5, causal=True))), QueryTile(2, 3, ())))
    wanted = [[1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert plan_mask(plan, 3, 6, 3).int().tolist() == wanted
    assert plan.visited_pairs == 2 + 3


@pytest.mark.parametrize(("start", "length", "tile"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_an_impossible_dense_plan_is_refused(start: int, length: int, tile: int):
    with pytest.raises(ValueError, match="dense_plan: start"):
        dense_plan(start, length, tile)


def test_the_reference_is_softmax_attention():
    q, k, v = torch.randn(3, 5, 2, DIM, dtype=torch.float64)
    got = attend_reference(q, k, v, 0, dense_plan(0, 5), 0.3)
    assert got.dtype == torch.float64
    for row in range(5):
        for head in range(2):
            weights = torch.softmax(k[: row + 1, head] @ q[row, head] * 0.3, 0)
            torch.testing.assert_close(got[row, head], weights @ v[: row + 1, head])
