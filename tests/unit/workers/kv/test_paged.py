"""Block tables against position-by-position arithmetic, and the cache they point into."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv import paged
from workers.kv.paged import PagedKV, PageTable, PlanMismatch, SlotRun, quantise


def slots(table: PageTable, start: int, stop: int) -> list[int]:
    return [run.first + i for run in table.runs(start, stop) for i in range(run.length)]


@settings(max_examples=150, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 7, 16, 64]),
    pages=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    data=st.data(),
)
def test_runs_are_the_slots_of_every_position(page_size: int, pages: list[int], cuts: list[int], data: st.DataObject):
    table = PageTable(page_size)
    edges = sorted({0, len(pages), *(cut for cut in cuts if cut < len(pages))})
    for low, high in itertools.pairwise(edges):
        table.append(pages[low:high])
    assert table.num_pages == len(pages)
    total = len(pages) * page_size
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    expected = [pages[p // page_size] * page_size + p % page_size for p in range(start, stop)]
    assert slots(table, start, stop) == expected
    assert table.slots(np.arange(start, stop)[::-1]).tolist() == expected[::-1]
    runs = table.runs(start, stop)
    assert all(run.length > 0 for run in runs)
    assert all(a.first + a.length != b.first for a, b in itertools.pairwise(runs)), "neighbours are one run"


def test_the_pages_are_copied_to_a_device_when_there_are_new_ones() -> None:
    table, cpu = PageTable(16), torch.device("cpu")
    table.append([3, 1])
    first = table.slots_on(cpu)
    assert first.tolist() == [48, 16]
    assert first.dtype == torch.int32
    assert table.slots_on(cpu) is first
    table.append([7])
    assert table.slots_on(cpu).tolist() == [48, 16, 112]
    assert first.tolist() == [48, 16]
    assert table.slots_on(torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_neighbouring_pages_are_one_run(page_size: int):
    table = PageTable(page_size)
    table.append([5, 6, 7])
    table.append([8, 3])
    assert table.runs(0, 5 * page_size) == [SlotRun(5 * page_size, 4 * page_size), SlotRun(3 * page_size, page_size)]
    assert table.runs(4 * page_size, 4 * page_size) == []


@pytest.mark.parametrize(("stop", "ok"), [(31, True), (32, True), (33, False)])
def test_positions_beyond_the_table_are_refused(stop: int, ok: bool):
    table = PageTable(16)
    table.append([0, 1])
    if ok:
        assert sum(run.length for run in table.runs(0, stop)) == stop
    else:
        with pytest.raises(PlanMismatch, match="position 32 lies beyond the 2 pages"):
            table.runs(0, stop)
        with pytest.raises(PlanMismatch, match="position 32 lies beyond the 2 pages"):
            table.slots(np.array([0, 32]))


@pytest.mark.parametrize("page_size", [1, 16])
def test_write_puts_rows_where_the_table_says(page_size: int):
    kv = PagedKV(layers=2, kv_heads=3, head_dim=4, num_pages=9, page_size=page_size, dtype=torch.float32)
    kv.layer(1).keys.fill_(torch.nan)
    kv.layer(1).values.fill_(torch.nan)
    table = PageTable(page_size)
    table.append([7, 2, 3])
    length = 3 * page_size
    keys, values = torch.randn(2, length, 3, 4)
    kv.write(1, table.runs(0, length), keys, values)
    where = slots(table, 0, length)
    assert torch.equal(kv.layer(1).keys[:, where].transpose(0, 1), keys)
    assert torch.equal(kv.layer(1).values[:, where].transpose(0, 1), values)
    untouched = sorted(set(range(9 * page_size)) - set(where))
    assert kv.layer(1).keys[:, untouched].isnan().all()
    assert kv.layer(1).values[:, untouched].isnan().all()


@pytest.mark.parametrize("length", [1, 16])
def test_a_page_outside_the_cache_is_refused(length: int):
    kv = PagedKV(1, 2, 4, num_pages=4, page_size=16, dtype=torch.float32)
    table = PageTable(16)
    table.append([4])
    rows = torch.zeros(length, 2, 4)
    with pytest.raises(PlanMismatch, match=f"slot {63 + length} of a plan lies outside the cache of 64 slots"):
        kv.write(0, table.runs(0, length), rows, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_keeps_a_scale_a_token_and_head(dtype: torch.dtype):
    kv = PagedKV(2, 3, 8, num_pages=4, page_size=16, dtype=torch.int8)
    table = PageTable(16)
    table.append([2, 0])
    keys, values = torch.randn(2, 32, 3, 8).to(dtype)
    keys[5] *= 1e4
    values[7, 1] = 0
    kv.write(1, table.runs(0, 32), keys, values)
    layer, where = kv.layer(1), slots(table, 0, 32)
    for small, scales, wanted in (
        (layer.keys, layer.key_scales, keys), (layer.values, layer.value_scales, values)
    ):  # fmt: skip
        assert scales is not None
        step = scales[:, where, None]
        torch.testing.assert_close(step[..., 0], wanted.float().abs().amax(-1).T / 127)
        assert bool(((small[:, where] * step - wanted.float().transpose(0, 1)).abs() <= step * 0.501).all())
        assert int(small[:, where].abs().amax(-1).min()) in (0, 127)


def test_int8_does_not_hide_what_is_not_finite():
    small, scales = quantise(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [0.0, 0.0], [1e-42, 0.0]]))
    assert not bool((small * scales[:, None]).isfinite()[:2].all(dim=1).any())
    assert bool((small * scales[:, None]).isfinite()[2:].all())


def test_fp8_rows_reach_the_largest_code_and_lose_three_bits():
    rows = torch.randn(67, 3, 32)
    rows[0, 0], rows[1, 1, 5] = 0, torch.inf
    codes, scales = quantise(rows, torch.float8_e4m3fn)
    assert not scales[1, 1].isfinite()
    assert not codes[0, 0].float().any()
    rows[1, 1] = 1
    codes, scales = quantise(rows, torch.float8_e4m3fn)
    assert (codes[1:].float().abs().amax(-1) == 448).all()
    error = (codes.float() * scales[..., None] - rows).abs()
    assert (error <= rows.abs() / 16 + scales[..., None] * 2**-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_the_cache_allocates_what_its_shape_says(dtype: torch.dtype):
    kv = PagedKV(3, 2, 8, num_pages=5, page_size=16, dtype=dtype)
    layer = kv.layer(0)
    allocated = layer.keys.untyped_storage().nbytes()
    if layer.key_scales is not None:
        allocated += layer.key_scales.untyped_storage().nbytes()
    scale = 4 if dtype.itemsize == 1 else 0  # float32, a row
    assert allocated == 5 * 16 * 2 * 3 * 2 * (8 * dtype.itemsize + scale)  # pages, tokens, K and V, layers, heads


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="num_pages: 0"):
        PagedKV(1, 1, 1, 0, 16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_long_ranges_begin_at_different_places_of_a_huge_page(dtype: torch.dtype) -> None:
    kv = PagedKV(3, 2, 64, 131072 // 16, 16, dtype)
    assert kv._data.shape == (2, 3, 2, 131072, 64)
    starts = {kv._data[side, layer, head].data_ptr() for side in range(2) for layer in range(3) for head in range(2)}
    assert len({start % (2 << 20) for start in starts}) == len(starts) == 12
    assert len({start // (2 << 20) for start in starts}) == 12
    keys, values = torch.randn(2, 5, 2, 64).to(torch.bfloat16)
    kv.write(2, [SlotRun(131069, 3), SlotRun(0, 2)], keys, values)
    stored = kv.layer(2)
    for rows, cache, scales in ((keys, stored.keys, stored.key_scales), (values, stored.values, stored.value_scales)):
        at = torch.tensor([131069, 131070, 131071, 0, 1])
        got = cache[:, at].float() * (1.0 if scales is None else scales[:, at, None])
        assert cache.stride()[1:] == (64, 1)
        assert torch.allclose(got.transpose(0, 1), rows.float(), atol=0.02 if dtype == torch.int8 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_first_slots_of_every_head_are_committed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    committed: list[torch.Tensor] = []
    monkeypatch.setattr(paged, "commit_memory", committed.append)
    kv = PagedKV(3, 2, 17, 5, 16, dtype)
    kv.commit(67)
    rows = [(kv.layer(layer), head) for layer in range(3) for head in range(2)]
    own = [tensor[head] for layer, head in rows for tensor in (layer.keys, layer.values)]
    own += [
        tensor[head] for layer, head in rows for tensor in (layer.key_scales, layer.value_scales) if tensor is not None
    ]
    assert sorted(rows.data_ptr() for rows in committed) == sorted(tensor.data_ptr() for tensor in own)
    assert {len(rows) for rows in committed} == {67}
    committed.clear()
    kv.commit(1000)
    assert {len(rows) for rows in committed} == {80}
    row = sum(rows[0].nbytes for rows in committed)
    monkeypatch.setattr(paged, "_COMMITTED_BYTES", 9 * row + 3)
    committed.clear()
    kv.commit(1000)
    assert {len(rows) for rows in committed} == {9}


def test_a_cache_that_does_not_fit_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        ValueError, match=r"^kv_cache: 7 pages of 16 tokens do not fit on cuda:0: lower [^\n]*fraction$"
    ):
        PagedKV(2, 2, 16, 7, 16, torch.bfloat16, "cuda:0")
