"""Heads that are normed, rotated, quantised and written to pages, against the PyTorch functions that do one each."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.triton.layer import heads as module
from workers.kv.paged import LayerKV, PagedKV, SlotRun, quantise
from workers.model.rope import CosSin, norm_and_rotate_

EPS = 1e-6
FP8 = torch.float8_e4m3fn


def tables(rows: int, count: int, dim: int) -> list[CosSin]:
    """Rotations of rows; the third is the same for all of them, with a stride of 0, as INTER is."""
    angles = torch.rand(count, rows, 1, dim // 2) * 6
    if count == 3:
        angles[2] = angles[2, :1]
    made = [CosSin(one.cos(), one.sin()) for one in angles]
    return [*made[:2], *(CosSin(*(side[:1].expand(rows, -1, -1) for side in one)) for one in made[2:])]


@pytest.mark.parametrize("cache", [torch.float32, torch.int8, FP8], ids=str)
@pytest.mark.parametrize(("rows", "rotations"), [(1, 3), (17, 2), (67, 1), (193, 3)])
def test_heads(rows: int, rotations: int, cache: torch.dtype) -> None:
    heads, kv_heads, dim = (3, 2, 12) if rows == 67 else (4, 1, 32)
    torch.manual_seed(rows)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim)
    norms = None if rows == 17 else torch.rand(heads + kv_heads, dim) + 0.5
    slots = torch.randperm(256)[:rows].int()
    shape = (kv_heads, 256, dim)
    kv = LayerKV(torch.zeros(shape, dtype=cache), torch.zeros(shape, dtype=cache))
    if cache != torch.float32:
        kv = LayerKV(kv.keys, kv.values, torch.zeros(shape[:2]), torch.zeros(shape[:2]))
    turns = tables(rows, rotations, dim)
    before = qkv.clone()
    got = module.store_heads(qkv, norms, EPS, turns, slots, kv)
    assert torch.equal(qkv, before)
    rotated = [norm_and_rotate_(before[:, : heads + kv_heads].clone(), turn, norms, EPS) for turn in turns]
    torch.testing.assert_close(got, torch.stack(rotated)[:, :, :heads], atol=2e-6, rtol=2e-6)
    sides = ((kv.keys, kv.key_scales, rotated[0][:, heads:]), (kv.values, kv.value_scales, before[:, -kv_heads:]))
    for index, (stored, scales, wanted) in enumerate(sides):
        mine = stored[:, slots].transpose(0, 1)
        if scales is None:
            torch.testing.assert_close(mine, wanted, atol=2e-6, rtol=2e-6)
            continue
        codes, steps = quantise(wanted, cache)
        torch.testing.assert_close(scales[:, slots].T, steps, atol=0, rtol=2e-6 if index == 0 else 0)
        if index == 1:
            assert torch.equal(mine.float(), codes.float())  # values are not rotated: the same inputs
        else:  # a last bit of the input may move a value to the next code, seldom
            near = torch.ones(()) if cache == torch.int8 else codes.float().abs().clamp_min(2**-6) / 7.9
            assert ((mine.float() - codes.float()).abs() <= near).all()
            assert (mine.float() != codes.float()).float().mean() < 0.01
    others = torch.ones(256, dtype=torch.bool).index_fill(0, slots.long(), False)
    assert not kv.keys[:, others].float().any()
    assert not kv.values[:, others].float().any()


@pytest.mark.parametrize("cache", [torch.int8, FP8], ids=str)
def test_ends_of_the_range_and_damaged_rows(cache: torch.dtype) -> None:
    qkv = torch.zeros(4, 3, 32)
    qkv[1, 1:, 5], qkv[2, 1:, 20], qkv[3, 1:, 7] = float("nan"), float("inf"), -1e30
    shape = (1, 4, 32)
    kv = LayerKV(*(torch.ones(shape).to(cache) for _ in "kv"), *(torch.ones(shape[:2]) for _ in "kv"))
    one = CosSin(torch.ones(4, 1, 16), torch.zeros(4, 1, 16))
    module.store_heads(qkv, None, EPS, [one], torch.arange(4).int(), kv)
    for codes, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
        assert scales is not None
        assert torch.isfinite(scales[0]).tolist() == [True, False, False, True]
        assert not codes[0, 0].float().any()
        assert scales[0, 0] == 0
        limit = module.LIMITS[cache]
        assert codes[0, 3, 7].float() == -limit
        assert abs(float(codes[0, 3, 7].float() * scales[0, 3]) + 1e30) < 1e24


def test_the_same_as_the_write_of_a_cache() -> None:
    torch.manual_seed(5)
    qkv = torch.randn(67, 6, 16)
    runs = [SlotRun(64, 32), SlotRun(0, 35)]
    slots = torch.cat([torch.arange(first, first + length) for first, length in runs]).int()
    mine, twin = (PagedKV(2, 2, 16, 4, 32, torch.int8) for _ in range(2))
    turn = tables(67, 1, 16)
    module.store_heads(qkv, None, EPS, turn, slots, mine.layer(1))
    rotated = norm_and_rotate_(qkv[:, 2:4].clone(), turn[0])
    twin.write(1, runs, rotated, qkv[:, 4:])
    for side in ("keys", "values", "key_scales", "value_scales"):
        first, second = (getattr(cache.layer(1), side)[:, slots].float() for cache in (mine, twin))
        assert (first - second).abs().max() <= (0 if side == "values" else 1)


@pytest.mark.parametrize("cache", [torch.float32, torch.int8], ids=str)
def test_rows_without_a_slot_are_rotated_but_not_written(cache: torch.dtype) -> None:
    qkv = torch.randn(5, 6, 16)
    turn = tables(5, 1, 16)
    mine, twin = (PagedKV(1, 2, 16, 1, 8, cache) for _ in range(2))
    for one in (mine, twin):
        for side in ("keys", "values", "key_scales", "value_scales"):
            if (whole := getattr(one.layer(0), side)) is not None:
                whole.zero_()
    got = module.store_heads(qkv, None, EPS, turn, torch.tensor([3, -1, 0, -1, 7]).int(), mine.layer(0))
    kept = [0, 2, 4]
    turns = [CosSin(*(side[kept] for side in one)) for one in turn]
    wanted = module.store_heads(qkv[kept], None, EPS, turns, torch.tensor([3, 0, 7]).int(), twin.layer(0))
    assert torch.equal(got[:, kept], wanted)
    assert got[:, [1, 3]].isfinite().all()
    for side in ("keys", "values"):
        assert torch.equal(getattr(mine.layer(0), side), getattr(twin.layer(0), side))
