"""Weights in the order of the compiled products, and back; random quantised ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from workers.kernels.abi import STRIP
from workers.model.compiled import packed
from workers.quant.weight import Kind, QuantizedWeight

__all__ = ["packed", "random_weight", "unpacked"]


def unpacked(weight: torch.Tensor, is_mlp: bool = False) -> torch.Tensor:
    """Return a packed weight in plain order, `[N, K]` or `[Er, N, K]`: a copy; any other tensor is returned itself.

    Args:
        is_mlp: one with six dimensions is gate and up of an MLP, not experts.
    """
    if is_mlp and weight.dim() == 6:
        return unpacked(weight[None])[0]
    if weight.dim() == 7:  # [Er, strip, which, tile, pair, row, of pair]
        experts, strips = weight.shape[:2]
        return weight.permute(0, 2, 1, 5, 3, 4, 6).reshape(experts, 2 * strips * STRIP, -1)
    if weight.dim() == 6:
        return weight.permute(0, 1, 4, 2, 3, 5).reshape(weight.shape[0], weight.shape[1] * STRIP, -1)
    if weight.dim() == 5:
        return weight.permute(0, 3, 1, 2, 4).reshape(weight.shape[0] * STRIP, -1)
    return weight


def random_weight(
    kind: Kind, shape: tuple[int, ...], group: int, zeros: torch.dtype | None = None,
    scale: torch.dtype = torch.float16, seed: int = 0,
) -> QuantizedWeight:  # fmt: skip
    """Return a weight `[..., N, K]` of a deviation of about `K ** -0.5`, with zero points of a type, or none."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    *leading, rows, depth = shape
    if kind == "float8_e4m3":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        width = depth // 2 if kind == "int4" else depth
        codes = torch.randint(0, 256, (*leading, rows, width), generator=generator, dtype=torch.uint8)
    spread = {"int4": 4.6, "int8": 74.0, "float8_e4m3": 1.0}[kind]
    numbers = (*leading, rows, -(-depth // group))
    scales = (torch.rand(numbers, generator=generator) + 0.5) / spread * depth**-0.5
    weight = QuantizedWeight(kind, group, codes, scales.to(scale))
    if zeros is None:
        return weight
    low, high = (0, 16) if zeros == torch.uint8 else (-9, 9)
    points = torch.randint(low, high, numbers, generator=generator)
    if zeros.is_floating_point:
        points = points + torch.rand(numbers, generator=generator)
    return replace(weight, zeros=points.to(zeros))
