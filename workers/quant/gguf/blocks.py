"""Blocks of a GGUF file, unpacked: codes of 8 bits, with a scale and a minimum a group.

    w = scale * code + minimum          code signed where the type has no minimum

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Legend: `R` rows, `B` blocks a row, `K` inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Unpacked(NamedTuple):
    """Rows of one type: `w = scales * codes + minima`, in exact arithmetic."""

    codes: torch.Tensor  # [R, K]: int8 around 0 without minima, else uint8 from 0
    scales: torch.Tensor  # [R, K / group]: float16, float32 for products of two numbers
    minima: torch.Tensor | None  # [R, K / group], same type, or None
    bits: int  # of a code in the file

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> torch.Tensor:
        """Return `[R, K]` in float32, each value rounded once or twice."""
        rows = len(self.codes)
        values = self.codes.view(rows, -1, self.group).float() * self.scales.float().unsqueeze(-1)
        if self.minima is not None:
            values += self.minima.float().unsqueeze(-1)
        return values.view(rows, -1)


def unpack(kind: str, data: torch.Tensor) -> Unpacked:
    """Return rows `[R, row bytes]` of uint8 unpacked; `kind` is one of KINDS."""
    size, reader = KINDS[kind]
    rows = len(data)
    return reader(data.reshape(rows, -1, size))


def _halves(blocks: torch.Tensor, offset: int, count: int = 1) -> torch.Tensor:
    """Return the float16 numbers `[R, B]` (`[R, B, count]` for more) at a byte of every block."""
    numbers = blocks[..., offset : offset + 2 * count].contiguous().view(torch.float16)
    return numbers.squeeze(-1) if count == 1 else numbers


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """Return `[..., 2 n]` of `[..., n]` bytes: all low nibbles, then all high ones."""
    return torch.cat([data & 15, data >> 4], dim=-1)


def _fifth_bits(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the bits `[R, B, 32]` of 4 bytes at an offset, the lowest first, as 16 or 0."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (blocks[..., offset : offset + 4].unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2) << 4


def _flat(codes: torch.Tensor) -> torch.Tensor:
    return codes.reshape(len(codes), -1)


def _centred(codes: torch.Tensor, middle: int) -> torch.Tensor:
    return _flat(codes).view(torch.int8) - middle


def _q4_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_centred(_nibbles(blocks[..., 2:]), 8), _halves(blocks, 0), None, 4)


def _q4_1(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_flat(_nibbles(blocks[..., 4:])), _halves(blocks, 0), _halves(blocks, 2), 4)


def _q5_0(blocks: torch.Tensor) -> Unpacked:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2)
    return Unpacked(_centred(codes, 16), _halves(blocks, 0), None, 5)


def _q5_1(blocks: torch.Tensor) -> Unpacked:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4)
    return Unpacked(_flat(codes), _halves(blocks, 0), _halves(blocks, 2), 5)


def _q8_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_flat(blocks[..., 2:]).view(torch.int8), _halves(blocks, 0), None, 8)


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and minima `[R, 8 B]` of Q4_K and Q5_K in float32: two float16, then 6-bit factors in 12 bytes."""
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=-1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=-1)
    unit = _halves(blocks, 0, 2).float()
    return _flat(scales.float() * unit[..., :1]), _flat(minima.float() * -unit[..., 1:])


def _nibbles_by_64(data: torch.Tensor) -> torch.Tensor:
    """Return `[R, B, 4, 2, 32]` of 128 bytes: of every 32 bytes the low nibbles, then the high ones."""
    parts = data.unflatten(-1, (4, 32))
    return torch.stack([parts & 15, parts >> 4], dim=-2)


def _q4_k(blocks: torch.Tensor) -> Unpacked:
    scales, minima = _scales_and_minima(blocks)
    return Unpacked(_flat(_nibbles_by_64(blocks[..., 16:])), scales, minima, 4)


def _q5_k(blocks: torch.Tensor) -> Unpacked:
    scales, minima = _scales_and_minima(blocks)
    shifts = torch.arange(8, dtype=torch.uint8).view(4, 2, 1)
    fifth = (blocks[..., None, None, 16:48] >> shifts) & 1  # bit g of byte i belongs to input 32 g + i
    return Unpacked(_flat(_nibbles_by_64(blocks[..., 48:]) | (fifth << 4)), scales, minima, 5)


def _q6_k(blocks: torch.Tensor) -> Unpacked:
    low = blocks[..., :128].unflatten(-1, (2, 64))  # of each half of a block
    low = torch.cat([low & 15, low >> 4], dim=-1).unflatten(-1, (4, 32))
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    codes = low | (((high >> shifts) & 3) << 4)  # [R, B, 2, 4, 32]
    factors = blocks[..., 192:208].contiguous().view(torch.int8).float()
    scales = factors * _halves(blocks, 208).float().unsqueeze(-1)
    return Unpacked(_centred(codes, 32), _flat(scales), None, 6)


KINDS: dict[str, tuple[int, Callable[[torch.Tensor], Unpacked]]] = {  # bytes of a block, and what unpacks it
    "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q5_0": (22, _q5_0), "Q5_1": (24, _q5_1), "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k),
}  # fmt: skip
