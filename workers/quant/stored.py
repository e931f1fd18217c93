"""What the readers of all formats share: the tensors of one stored matrix, and ranges of it.

Legend: `N` rows (outputs), `K` columns (inputs), `G` groups of a row, `n` and `g` rows and groups of a range.
"""

from __future__ import annotations

from typing import Protocol

import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from workers.quant.weight import pack_nibbles, unpack_nibbles


class StoredMatrix(Protocol):
    """The tensors that store one quantised matrix; their names and shapes are checked."""

    @property
    def rows(self) -> int:
        """Outputs of the whole matrix."""
        ...

    @property
    def columns(self) -> int:
        """Inputs of the whole matrix."""
        ...

    def has(self, part: str) -> bool:
        """Return whether there is a tensor of this name."""
        ...

    def read(self, part: str, *region: slice) -> torch.Tensor:
        """Return a tensor, or a region of one, in its stored type."""
        ...

    def error(self, part: str, problem: str) -> Exception:
        """Return the error of a tensor."""
        ...


def outward(span: Span, step: int, size: int) -> Span:
    """Return the smallest range of whole steps around a range, ended by `size`."""
    return Span(span.start // step * step, min(-(-span.stop // step) * step, size))


def words(span: Span, count: int) -> slice:
    """Return where the values of a range are, when `count` of them make one; the range begins at a multiple."""
    return slice(span.start // count, -(-span.stop // count))


def group_size(scheme: QuantScheme, columns: int) -> int:
    """Return the inputs that share a scale in a matrix of `columns` inputs."""
    return min(scheme.group, columns) if scheme.group else columns


def codes_of_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Return the bytes of int32 `[..., m]` as `[..., 4 m]` uint8, the lowest first."""
    if not packed.is_contiguous() or packed.stride(-1) != 1:  # a dimension of 1 may have any stride
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.uint8)


def unpack_words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the 4- or 8-bit values of int32 `[..., m]` as `[..., m * 32 / bits]` uint8, the lowest first."""
    values = codes_of_bytes(packed)
    return unpack_nibbles(values) if bits == 4 else values


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return 8-bit codes 0 to 255 as the bits of code - 128; 4-bit ones stay as they are."""
    return codes ^ 0x80 if bits == 8 else codes


def zero_points(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return zero points as `QuantizedWeight` keeps them, of unsigned ones in uint8."""
    return (values ^ 0x80).view(torch.int8) if bits == 8 else values


def activation_order(stored: StoredMatrix, part: str, group: int) -> torch.Tensor | None:
    """Return the inputs `[K]` int32 sorted by group, None where they are in their own order.

    Args:
        part: name of the tensor `[K]` that has the group of every input.

    Raises:
        CheckpointError: a group has more or fewer inputs than its size.
    """
    if not stored.has(part):
        return None
    of_group = stored.read(part).to(torch.int64)
    plain = torch.arange(stored.columns) // group
    if torch.equal(of_group, plain):
        return None
    order = torch.argsort(of_group, stable=True)
    if not torch.equal(of_group[order], plain):
        raise stored.error(part, f"groups of other sizes than {group}: not read")
    return order.to(torch.int32)


def reorder(codes: torch.Tensor, order: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes `[n, K]` (packed for 4 bits) with the columns in another order."""
    if bits == 8:
        return codes[:, order.long()]
    return pack_nibbles(unpack_nibbles(codes)[:, order.long()])


def row_values(
    stored: StoredMatrix, part: str, scheme: QuantScheme, rows: Span, groups: slice
) -> torch.Tensor:  # fmt: skip
    """Return scales or zero points `[n, g]` of rows and groups; a value of many rows is repeated."""
    if scheme.block_rows:
        blocks = words(outward(rows, scheme.block_rows, stored.rows), scheme.block_rows)
        values = stored.read(part, blocks, groups)
        return values[torch.arange(rows.start, rows.stop) // scheme.block_rows - blocks.start]
    if scheme.group:
        return stored.read(part, slice(*rows), groups)
    values = stored.read(part).reshape(-1)
    return values.expand(stored.rows)[slice(*rows), None]
