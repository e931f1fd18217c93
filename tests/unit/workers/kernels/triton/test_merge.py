"""Parts of attention joined by one kernel, in Triton's interpreter, against a softmax over all keys in float64."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.triton.merge import merge_parts


@pytest.mark.parametrize("sizes", [(5, 9), (33, 1, 17), (3, 64, 7, 20)])
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (17, 48), (67, 128)])
def test_parts_are_joined_as_one_softmax(sizes: tuple[int, ...], rows: int, dim: int) -> None:
    heads, generator = 3, torch.Generator().manual_seed(rows)
    logits = 4 * torch.randn(rows, heads, sum(sizes), generator=generator).double()
    values = torch.randn(heads, sum(sizes), dim, generator=generator).double()
    logits[0, :, : sizes[0]] = -torch.inf  # a row that sees no key of the first part
    parts = []
    for part_logits, part_values in zip(logits.split(sizes, 2), values.split(sizes, 1), strict=True):
        weights = part_logits.softmax(-1).nan_to_num()
        out = torch.einsum("thn,hnd->htd", weights, part_values).float()
        lse = part_logits.logsumexp(-1).float()
        parts.append((out.contiguous().transpose(0, 1), lse.T.contiguous().T))  # as libraries return them
    expected = torch.einsum("thn,hnd->thd", logits.softmax(-1), values)
    torch.testing.assert_close(merge_parts(parts).double(), expected, rtol=1e-5, atol=1e-6)


def test_results_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(5, 2, 16, generator=generator).half() for _ in range(2)]
    lse = [torch.randn(5, 2, generator=generator) for _ in range(2)]
    share = torch.sigmoid(lse[1] - lse[0])[..., None].double()
    expected = (outs[0].double() * (1 - share) + outs[1].double() * share).half()
    got = merge_parts(list(zip(outs, lse, strict=True)))
    assert got.dtype == torch.float16
    assert (got != expected).float().mean() < 0.05
    assert torch.allclose(got, expected, atol=2e-3)
