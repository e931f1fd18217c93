"""One layout of quantised weights, whatever file they come from, and its slow reference.

    w[n, order[j]] = scales[n, j // group] * (code[n, j] - zeros[n, j // group])

Legend: `N` outputs (rows), `K` inputs (columns), `G = ceil(K / group)`; leading dimensions are experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from workers.quant.packed import PackedWeight

Kind = Literal["int4", "int8", "float8_e4m3"]
KINDS: tuple[Kind, ...] = ("int4", "int8", "float8_e4m3")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_GROUP = 16  # kernels load at least so many inputs of one scale
_BLOCK = 1 << 20  # weights that are dequantised at once


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix `[..., N, K]` of 4- or 8-bit codes with one scale, and perhaps one zero point, a row and group."""

    kind: Kind
    group: int  # inputs that share a scale; the last group may be shorter
    codes: torch.Tensor  # uint8: int4 `[..., N, K / 2]`, even k in the low nibble, 0 to 15; else `[..., N, K]` bits
    scales: torch.Tensor  # `[..., N, G]`, of the type in the file: float16, bfloat16 or float32
    zeros: torch.Tensor | None = None  # `[..., N, G]`: uint8 for int4, int8 for int8, or float; None: 8 for int4, or 0
    order: torch.Tensor | None = None  # `[..., K]` int32, the input of every column; None: column k is input k

    def __post_init__(self) -> None:
        """Check the parts against each other. Raises ValueError."""
        rows, depth = self.shape[-2:]
        if self.kind not in KINDS or self.codes.dtype != torch.uint8:
            raise ValueError(f"codes: {self.kind} in {self.codes.dtype}: must be uint8, and one of {', '.join(KINDS)}")
        if self.group < 1:
            raise ValueError(f"group: {self.group}: must be at least 1")
        shape = (*self.codes.shape[:-2], rows, -(-depth // self.group))
        if tuple(self.scales.shape) != shape or self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(f"scales: {self.scales.dtype} {list(self.scales.shape)}: must be float {list(shape)}")
        if self.zeros is not None and (tuple(self.zeros.shape) != shape or self.kind == "float8_e4m3"):
            raise ValueError(f"zeros: {list(self.zeros.shape)}: must be {list(shape)}, and none for float8_e4m3")
        if self.order is not None and tuple(self.order.shape) != (*shape[:-2], depth):
            raise ValueError(f"order: {list(self.order.shape)}: must be {[*shape[:-2], depth]}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[..., N, K]` of the matrix."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (2 if self.kind == "int4" else 1))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def parts(self) -> dict[str, Any]:
        """The tensors of the weight by field."""
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "order": self.order}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def layout(self) -> tuple[object, ...]:
        """What must agree for two weights to be stored below each other."""
        return self.kind, self.group, *((name, part.dtype) for name, part in self.parts.items())

    def __getitem__(self, index: int | slice) -> QuantizedWeight:
        """Return one expert, or a range of them, sharing memory."""
        assert self.codes.dim() > 2, "no leading dimension"
        return replace(self, **{name: part[index] for name, part in self.parts.items()})

    def rows(self, rows: slice) -> QuantizedWeight:
        """Return a range of outputs, sharing memory."""
        cut = {name: part[..., rows, :] for name, part in self.parts.items() if name != "order"}
        return replace(self, **cut)

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """Return a range of inputs; a range that cuts groups gets smaller groups, whose scales repeat.

        Raises:
            ValueError: the groups would be smaller than 16, or the inputs are ordered by activation.
        """
        depth = self.shape[-1]
        if (start, stop) == (0, depth):
            return self
        if self.order is not None:
            raise ValueError(f"inputs {start} to {stop} of {depth}: ordered by activation (desc_act): not split")
        group = self.group
        if group < depth:
            cuts = [start, *([stop] if stop < depth else [])]
            group = math.gcd(self.group, *cuts)
            if group < min(MIN_GROUP, self.group):
                raise ValueError(f"inputs {start} to {stop} of {depth}: cut the groups of {self.group} to {group}")
        if self.kind == "int4" and (start % 2 or stop % 2):
            raise ValueError(f"inputs {start} to {stop} of {depth}: cut a byte of two codes")
        per_byte = 2 if self.kind == "int4" else 1
        first, count = (start // group, -(-(stop - start) // group)) if group < depth else (0, 1)
        repeat = self.group // group if group < depth else 1
        # the group of every new, smaller one
        source = torch.arange(first, first + count, device=self.codes.device) // repeat
        return QuantizedWeight(
            self.kind,
            group if group < depth else stop - start,
            self.codes[..., start // per_byte : stop // per_byte],
            self.scales[..., source],
            None if self.zeros is None else self.zeros[..., source],
        )

    def split(self, counts: Sequence[int]) -> list[QuantizedWeight]:
        """Return shards of so many experts each, sharing memory."""
        assert sum(counts) == self.codes.shape[0], "the counts are not all experts"
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        return [self[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix `[..., N, K]`, computed in float32 and rounded once, inputs in their own order."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if self.codes.dim() > 2:
            for index in range(self.codes.shape[0]):
                out[index] = self[index].dequantize(dtype)
            return out
        step = max(1, _BLOCK // max(1, self.shape[-1]))
        for start in range(0, self.shape[0], step):
            block = self.rows(slice(start, start + step))._wide()
            if self.order is None:
                out[start : start + step] = block
            else:
                out[start : start + step, self.order.long()] = block.to(dtype)
        return out

    def _wide(self) -> torch.Tensor:
        """Return `[N, K]` in float32, columns as they are stored."""
        rows, depth = self.shape
        values = self._values()
        of_group = torch.arange(depth, device=values.device) // self.group
        zeros = self.zeros.float()[:, of_group] if self.zeros is not None else 8.0 if self.kind == "int4" else 0.0
        assert values.shape == (rows, depth)
        return (values - zeros) * self.scales.float()[:, of_group]

    def _values(self) -> torch.Tensor:
        if self.kind == "int4":
            return unpack_nibbles(self.codes).float()
        return self.codes.view(torch.int8 if self.kind == "int8" else torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class RowStack:
    """Matrices below each other that differ in their layout: some quantised in another way, or not at all."""

    parts: tuple[torch.Tensor | QuantizedWeight | PackedWeight, ...]  # `[N, K]` each

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[N, K]` of the whole."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix `[N, K]`."""
        return torch.cat([plain(part, dtype) for part in self.parts])


Weight: TypeAlias = "torch.Tensor | QuantizedWeight | RowStack | PackedWeight"


def plain(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as a matrix of `dtype`; a tensor is returned as it is."""
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize(dtype)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return `[..., 2 n]` values 0 to 15 of `[..., n]` bytes, the low nibble first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return `[..., n]` bytes of `[..., 2 n]` values 0 to 15 in uint8, the low nibble first."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def empty_like(weight: QuantizedWeight, shape: Sequence[int], device: torch.device | str = "cpu") -> QuantizedWeight:
    """Return a weight `[..., N, K]` of unspecified content in the layout of another with the same `K`."""
    rows, depth, leading = shape[-2], shape[-1], tuple(shape[:-2])
    assert depth == weight.shape[-1]

    def make(name: str, part: torch.Tensor) -> torch.Tensor:
        own = (part.shape[-1],) if name == "order" else (rows, part.shape[-1])
        return torch.empty((*leading, *own), dtype=part.dtype, device=device)

    made: dict[str, Any] = {name: make(name, part) for name, part in weight.parts.items()}
    return replace(weight, **made)
