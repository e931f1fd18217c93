"""Quantised weights in the order of the compiled products (workers/kernels/gemm/weights.h).

Strips of 16 outputs, tiles of 32 inputs. A tile of 8-bit codes has 16 lines: line `i` holds inputs `2 i` and `2 i + 1`
of each output. A tile of 4-bit codes has 8: line `p` holds inputs `4 p` and `4 p + 1` in the low halves of bytes, the
next two in the high ones.

Legend: `N` outputs, `K` inputs, `G` groups, `S = N / 16` strips, `L` lines of a tile; leading dimensions are experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from workers.kernels.abi import DEPTH, STRIP
from workers.quant.weight import MIN_GROUP, Kind, QuantizedWeight, Weight


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix `[N, K]`, or those `[Er, N, K]` of experts; with `pairs`, strips of gate and of up take turns."""

    kind: Kind
    group: int
    pairs: bool
    codes: torch.Tensor  # int16, two bytes of an output: [..., S, K / 32, L, 16]
    scales: torch.Tensor  # [..., S, G, 16]
    zeros: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[..., N, K]` of the matrix."""
        *leading, strips, tiles, _, _ = self.codes.shape
        return (*leading, strips * STRIP, tiles * DEPTH)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def _parts(self) -> dict[str, Any]:
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        return {name: part for name, part in named.items() if part is not None}

    def __getitem__(self, index: int | slice) -> PackedWeight:
        """Return one expert, or a range of them, sharing memory."""
        assert self.codes.dim() > 4, "no leading dimension"
        return replace(self, **{name: part[index] for name, part in self._parts.items()})

    def rows_at(self, rows: torch.Tensor) -> QuantizedWeight:
        """Return outputs `[n]` of a matrix `[N, K]`: a copy."""
        assert not self.pairs
        strip, place = rows // STRIP, rows % STRIP
        codes = self.codes.permute(0, 3, 1, 2)[strip, place].view(len(rows), -1).view(torch.uint8)
        scales = self.scales.transpose(1, 2)[strip, place]
        zeros = None if self.zeros is None else self.zeros.transpose(1, 2)[strip, place]
        return QuantizedWeight(self.kind, self.group, _in_lines(codes) if self.kind == "int4" else codes, scales, zeros)

    def put(self, first: int, rows: QuantizedWeight) -> None:
        """Write rows `[n, K]`, from row `first` of a matrix on."""
        at = torch.arange(first, first + rows.shape[0])
        strip, place = at // STRIP, at % STRIP
        if self.pairs:
            half = self.shape[-2] // 2
            strip = at % half // STRIP * 2 + at // half
        tiles, lines = self.codes.shape[-3:-1]
        codes = _in_lines(rows.codes) if rows.kind == "int4" else rows.codes
        self.codes.permute(0, 3, 1, 2)[strip, place] = codes.view(torch.int16).view(-1, tiles, lines)
        self.scales.transpose(1, 2)[strip, place] = rows.scales
        if self.zeros is not None:
            assert rows.zeros is not None
            self.zeros.transpose(1, 2)[strip, place] = rows.zeros

    def unpacked(self) -> QuantizedWeight:
        """Return the weight with its outputs below each other: a copy."""
        codes = self._rows(self.codes.movedim(-1, -3).flatten(-2).contiguous()).view(torch.uint8)
        scales = self._rows(self.scales.transpose(-1, -2))
        zeros = None if self.zeros is None else self._rows(self.zeros.transpose(-1, -2))
        return QuantizedWeight(self.kind, self.group, _in_lines(codes) if self.kind == "int4" else codes, scales, zeros)

    def _rows(self, strips: torch.Tensor) -> torch.Tensor:
        """Return `[..., N, n]` of `[..., S, 16, n]`."""
        if self.pairs:
            strips = strips.unflatten(-3, (-1, 2)).transpose(-4, -3).flatten(-4, -3)
        return strips.flatten(-3, -2).contiguous()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix `[..., N, K]`, computed in float32 and rounded once."""
        return self.unpacked().dequantize(dtype)


Experts: TypeAlias = torch.Tensor | QuantizedWeight | PackedWeight  # of a layer, `[Er, N, K]`


def has_whole_tiles(shape: Sequence[int], pairs: bool) -> bool:
    """Return whether a matrix `[..., N, K]` consists of whole strips and tiles."""
    rows, depth = shape[-2:]
    even = (DEPTH if shape[:-2] else STRIP) * (2 if pairs else 1)  # an expert's I is the depth of its second product
    return rows % even == 0 and depth % DEPTH == 0


def can_pack(weight: QuantizedWeight, shape: Sequence[int], pairs: bool) -> bool:
    """Return whether a weight of `shape` `[..., N, K]` in the layout of another can be packed."""
    whole = weight.group >= shape[-1] or weight.group % MIN_GROUP == 0
    return weight.order is None and whole and has_whole_tiles(shape, pairs)


def empty_packed(weight: QuantizedWeight, shape: Sequence[int], pairs: bool) -> PackedWeight:
    """Return a packed weight `[..., N, K]` of unspecified content in the layout of another with the same `K`."""
    *leading, rows, depth = shape
    assert can_pack(weight, shape, pairs)
    strips, lines = rows // STRIP, STRIP // (2 if weight.kind == "int4" else 1)

    def numbers(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(*leading, strips, like.shape[-1], STRIP, dtype=like.dtype)

    return PackedWeight(
        weight.kind, min(weight.group, depth), pairs,
        torch.empty(*leading, strips, depth // DEPTH, lines, STRIP, dtype=torch.int16),
        numbers(weight.scales), None if weight.zeros is None else numbers(weight.zeros),
    )  # fmt: skip


def pack(weight: QuantizedWeight, pairs: bool = False) -> PackedWeight:
    """Return a packed copy of `[N, K]` or `[Er, N, K]`; it must fit (`can_pack`)."""
    out = empty_packed(weight, weight.shape, pairs)
    if out.codes.dim() == 4:
        out.put(0, weight)
    else:
        for expert in range(weight.shape[0]):
            out[expert].put(0, weight[expert])
    return out


def look_up(table: Weight, rows: torch.Tensor) -> torch.Tensor:
    """Return rows `[n, K]` of a table `[N, K]`: in its type, or in bfloat16."""
    if isinstance(table, torch.Tensor):
        return F.embedding(rows, table)
    assert isinstance(table, PackedWeight), "tables are plain or packed"
    return table.rows_at(rows).dequantize(torch.bfloat16)


def _in_lines(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes `[..., K / 2]`, where inputs 0 to 3 share two bytes as 0 2, 1 3 in place of 0 1, 2 3.

    It is its own inverse.
    """
    first, second = codes[..., 0::2], codes[..., 1::2]
    return torch.stack([(first & 15) | (second << 4), (first >> 4) | (second & 0xF0)], dim=-1).flatten(-2)
