"""The parts that attention kernels share, in a kernel of one tile."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from workers.kernels.triton.blocks import (
    QuerySides,
    Target,
    causal_step,
    load_block,
    load_queries,
    load_scales,
    softmax_step,
    store_rows,
)
from workers.kernels.triton.staging import Staged


@triton.jit
def one_tile_kernel(
    q, q_row, q_head, keys, values, scales, out, head, length,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows at M .. see their own keys from position M on, and all of the M keys before them; row 3 has position 0."""
    scale = load_scales(scales, 0, length, M)
    tile = load_queries(q, q_row, q_head, head, 0, length, M, D, tl.float32)
    acc, total = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    largest = tl.full([M], float("-inf"), tl.float32)
    acc, total, largest = causal_step(
        tile, keys, values, head * 0 + 3, M, M + length - N, scale, acc, total, largest, M, N, D, TMA, tl.float32
    )
    for first in range(0, M, N):
        logits = tl.dot(tile, load_block(keys, head * 0 + 3 + first, N, D, TMA).T)
        v = load_block(values, head * 0 + 3 + first, N, D, TMA)
        acc, total, largest = softmax_step(logits, v, scale, acc, total, largest, tl.float32)
    store_rows(out, acc / total[:, None], q_row, head, 0, length, M, D)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("keys_a_block", [16, 32, 64])
@pytest.mark.parametrize("length", [1, 17, 64])
def test_one_tile(length: int, keys_a_block: int, tma: bool) -> None:
    torch.manual_seed(length)
    q, (k, v) = torch.randn(64, 3, 16), torch.randn(2, 131, 16)
    for side in (k, v):
        side[:3], side[3 + 64 + length :] = torch.nan, torch.nan
    scales, out = torch.linspace(0.1, 0.3, length), torch.full((64, 3, 16), torch.nan)
    target = Target(tma, tl.float32, torch.float32)
    sides = target.sides(Staged(k, v, 1, 131, 131), keys_a_block)
    one_tile_kernel[(1,)](
        *QuerySides(q, None, None).arguments()[:3], *sides, scales, out, 1, length, M=64, N=keys_a_block, D=16, TMA=tma
    )
    k, v = (side[3 : 3 + 64 + length].double() for side in (k, v))
    logits = (q[:length, 1].double() @ k.T) * scales.double()[:, None]
    hidden = torch.arange(64 + length) > torch.arange(length)[:, None] + 64
    wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out[:length, 1].double(), wanted, atol=2e-6, rtol=2e-6)
    assert out[:, [0, 2]].isnan().all()
    assert out[length:].isnan().all()


def test_missing_regions_are_stood_in_for() -> None:
    q = torch.empty(5, 7, 16)[:, :4]
    far = torch.empty(5, 4, 16)
    assert QuerySides(q, None, far).arguments() == [q, 112, 16, q, 112, 16, far, 64, 16]


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Target.of(torch.device("cpu")) == (False, tl.float32, torch.float32, (8, 0))
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        wanted = capability != (8, 0), tl.bfloat16, torch.bfloat16, capability
        assert Target.of(torch.device("cuda")) == wanted
