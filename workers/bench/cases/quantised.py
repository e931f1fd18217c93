"""Random quantised weights in the one layout, and the definition of products whose activations are quantised too."""

from __future__ import annotations

import torch

from workers.quant.weight import Kind, QuantizedWeight

GROUP = 128  # activations that share a scale
FP8 = torch.float8_e4m3fn


def random_weight(
    kind: Kind, shape: tuple[int, ...], group: int, *, zeros: bool = False, ordered: bool = False,
    block_rows: int = 1, seed: int = 0,
) -> QuantizedWeight:  # fmt: skip
    """Return a weight of `shape` `[..., N, K]` with values of about `K ** -0.5`.

    Args:
        block_rows: outputs that share their scales, as in blocks of 128 x 128.
    """
    make = torch.Generator().manual_seed(seed)
    *leading, rows, depth = shape
    groups = -(-depth // group)
    if kind == "float8_e4m3":
        codes = (torch.randn(shape, generator=make) * 100).clamp(-448, 448).to(FP8).view(torch.uint8)
    else:
        per_byte = 2 if kind == "int4" else 1
        codes = torch.randint(0, 256, (*shape[:-1], depth // per_byte), generator=make, dtype=torch.uint8)
    size = {"int4": 8.0, "int8": 100.0, "float8_e4m3": 100.0}[kind]
    blocks = -(-rows // block_rows)
    scales = (torch.rand(*leading, blocks, groups, generator=make) + 0.5) / size * depth**-0.5
    scales = scales.repeat_interleave(block_rows, dim=-2)[..., :rows, :].contiguous()
    low, high, dtype = (0, 16, torch.uint8) if kind == "int4" else (-20, 20, torch.int8)
    made_zeros = torch.randint(low, high, scales.shape, generator=make, dtype=dtype) if zeros else None
    order = None
    if ordered:
        order = torch.rand(*leading, depth, generator=make).argsort(-1).int()
    return QuantizedWeight(kind, group, codes, scales, made_zeros, order)


def quantise_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 codes `[T, K]` and the scale of each token and 128 inputs `[T, G]`: `max |x| / 448`."""
    parts = x.float().split(GROUP, dim=1)
    scales = torch.stack([part.abs().amax(1) / 448 for part in parts], 1)
    codes = [
        part / one.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        for part, one in zip(parts, scales.T, strict=True)
    ]
    return torch.cat(codes, 1).to(FP8), scales


def scaled_product_reference(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Compute `x @ weight.T` of activations that were quantised, `[T, N]` in float64."""
    codes, scales = quantise_rows_reference(x)
    rounded = codes.double() * scales.double().repeat_interleave(GROUP, 1)[:, : x.shape[1]]
    return rounded @ dequantised(weight).T


def dequantised(weight: QuantizedWeight) -> torch.Tensor:
    """Return the matrix in float64."""
    return weight.dequantize(torch.float32).double()
