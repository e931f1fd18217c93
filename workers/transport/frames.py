"""Tensors as frames: a header of 64 bytes and up to 2 MiB of the tensor each, the same bytes on every kind of link.

A tensor of one step is cut into `count` frames, sent in order. The receiver checks a header before it makes room for
what follows, and a checksum over both before anyone sees the tensor. No pickle. Whole frames of an earlier epoch, which
a sender that was replaced may still send, are skipped wherever they come.

A tensor that goes another way (`device.py`) is announced: by a header without payload, as that of a tensor in 0 frames.

Header, little-endian: CRC-32 of all that follows it (uint32), payload bytes (uint32), step (uint64), index and count
(uint32), type and number of dimensions (uint8), 2 unused bytes, epoch (uint32), shape of the whole tensor (4 x uint64).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

MAX_PAYLOAD = 2 * 1024 * 1024
MAX_TENSOR = 4 * 1024**3  # bytes; more in one step is a broken message
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)  # by their number on the wire; int64: token ids
_MAX_DIMENSIONS = 4
_CRC = struct.Struct("<I")
_FIELDS = struct.Struct("<IQIIBB2xI4Q")
HEADER_BYTES = _CRC.size + _FIELDS.size


class FrameError(RuntimeError):
    """A frame is damaged or does not continue the tensor before it."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself."""

    step: int
    index: int  # 0 .. count - 1
    count: int  # frames of the tensor; 0: it is only announced
    dtype: int  # index into DTYPES
    shape: tuple[int, ...]  # of the whole tensor
    size: int  # bytes of the payload
    epoch: int = 0  # of the sender; it rises when stages are replaced

    def pack(self, payload: bytes | memoryview) -> bytes:
        """Return the header as it travels, with the checksum of itself and the payload."""
        shape = (*self.shape, *[0] * (_MAX_DIMENSIONS - len(self.shape)))
        numbers = self.size, self.step, self.index, self.count, self.dtype, len(self.shape), self.epoch
        fields = _FIELDS.pack(*numbers, *shape)
        return _CRC.pack(_checksum(fields, payload)) + fields

    @classmethod
    def unpack(cls, header: bytes | memoryview) -> Header:
        """Read a header.

        Raises:
            FrameError: the tensor has too many dimensions.
        """
        size, step, index, count, dtype, dimensions, epoch, *shape = _FIELDS.unpack_from(header, _CRC.size)
        if dimensions > _MAX_DIMENSIONS:
            raise FrameError(f"step {step}: a tensor of {dimensions} dimensions: must be at most {_MAX_DIMENSIONS}")
        return cls(step, index, count, dtype, tuple(shape[:dimensions]), size, epoch)


def split(tensor: torch.Tensor, step: int, max_payload: int = MAX_PAYLOAD, epoch: int = 0) -> Iterator[bytes]:
    """Cut a tensor into frames, each made when it is taken; an empty tensor is one empty frame.

    Raises:
        ValueError: links do not carry its type.
    """
    dtype, shape, data = _number_of(tensor.dtype), tuple(tensor.shape), _bytes_of(_to_host(tensor.detach()))
    count = max(1, -(-len(data) // max_payload))

    def frame(index: int) -> bytes:
        payload = data[index * max_payload : (index + 1) * max_payload]
        return b"".join((Header(step, index, count, dtype, shape, len(payload), epoch).pack(payload), payload))

    return map(frame, range(count))


def announce(tensor: torch.Tensor, step: int, epoch: int = 0) -> bytes:
    """Return the frame that announces a tensor. Raises ValueError as `split`."""
    return Header(step, 0, 0, _number_of(tensor.dtype), tuple(tensor.shape), 0, epoch).pack(b"")


def read_announcement(
    fill: Callable[[memoryview], object], epoch: int = 0, on_late: Callable[[], object] = lambda: None
) -> Header:
    """Read the frame that announces a tensor. Args and raises: as of `read_tensor`."""
    data = memoryview(bytearray(HEADER_BYTES))
    frame = _read_header(fill, data, epoch, on_late)
    if frame.count or frame.index or frame.size:
        raise FrameError(f"step {frame.step}: frame {frame.index} of {frame.count} where an announcement was due")
    _check_sum(frame, data, memoryview(b""))
    check_size(frame)
    return frame


def read_tensor(
    fill: Callable[[memoryview], object], epoch: int = 0, on_late: Callable[[], object] = lambda: None,
    pin: bool = False,
) -> tuple[int, torch.Tensor]:  # fmt: skip
    """Read the frames of one tensor; returns its step and the tensor.

    Args:
        fill: reads as many bytes as there is room for in a buffer.
        epoch: of the receiver; frames of an earlier one are dropped.
        on_late: called for every frame that was dropped.
        pin: put it into memory that a GPU copies from at full speed.

    Raises:
        FrameError: a frame does not continue the one before it, is damaged or of a later epoch, or the tensor would be
            too large.
    """
    data = memoryview(bytearray(HEADER_BYTES))
    frame = first = _read_header(fill, data, epoch, on_late)
    if frame.index:
        raise FrameError(f"step {frame.step}: frame {frame.index} where 0 was due")
    tensor = _allocate(first, pin)
    room = _bytes_of(tensor)
    for index in range(first.count):
        if index:
            frame = _read_header(fill, data, epoch, on_late)
            _check_continues(frame, first, index)
        payload, room = room[: frame.size], room[frame.size :]
        if len(payload) < frame.size:
            raise FrameError(f"step {frame.step}: more bytes than the shape {list(frame.shape)} holds")
        fill(payload)
        _check_sum(frame, data, payload)
    if len(room):
        raise FrameError(f"step {first.step}: {len(room)} bytes fewer than the shape {list(first.shape)} holds")
    return first.step, tensor


def _read_header(
    fill: Callable[[memoryview], object], data: memoryview, epoch: int, on_late: Callable[[], object]
) -> Header:
    """Read the header of the next frame of this epoch into `data`; whole frames of earlier ones are dropped."""
    while True:
        fill(data)
        frame = Header.unpack(data)
        if frame.epoch == epoch:
            return frame
        if frame.epoch > epoch or frame.size > MAX_PAYLOAD:
            raise FrameError(f"step {frame.step}: {frame.size} bytes of epoch {frame.epoch} in epoch {epoch}")
        payload = memoryview(bytearray(frame.size))
        fill(payload)
        _check_sum(frame, data, payload)
        on_late()


def _check_sum(frame: Header, data: memoryview, payload: memoryview) -> None:
    if _CRC.unpack_from(data)[0] != _checksum(data[_CRC.size :], payload):
        raise FrameError(f"step {frame.step}: frame {frame.index} of {frame.count} is damaged (checksum differs)")


def _check_continues(frame: Header, first: Header, index: int) -> None:
    if frame.index == 0:
        raise FrameError(f"step {frame.step} begins before step {first.step} is complete")
    if frame.index != index:
        raise FrameError(f"step {frame.step}: frame {frame.index} where {index} was due")
    if (frame.step, frame.count, frame.dtype, frame.shape) != (first.step, first.count, first.dtype, first.shape):
        raise FrameError(f"step {frame.step}: frame {frame.index} belongs to another tensor")


def check_size(first: Header) -> torch.dtype:
    """Return the type of the tensor that its first frame describes. Raises FrameError: no such tensor is sent."""
    if first.dtype >= len(DTYPES):
        raise FrameError(f"step {first.step}: unknown dtype {first.dtype}")
    dtype = DTYPES[first.dtype]
    # the largest dimension too: beside a zero, one of any size holds no bytes
    size = max(math.prod(first.shape) * dtype.itemsize, *first.shape, 0)
    if size > MAX_TENSOR or first.count > MAX_TENSOR // MAX_PAYLOAD + 1:
        raise FrameError(f"step {first.step}: shape {list(first.shape)} in {first.count} frames is too large")
    return dtype


def _allocate(first: Header, pin: bool) -> torch.Tensor:
    """Return an empty tensor as its first frame describes it."""
    dtype = check_size(first)
    if not first.count:
        raise FrameError(f"step {first.step}: a tensor in 0 frames: must be at least 1")
    return torch.empty(first.shape, dtype=dtype, pin_memory=pin)


def _number_of(dtype: torch.dtype) -> int:
    """Return the number of a type on the wire. Raises ValueError: it has none."""
    if dtype not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"dtype: {str(dtype).removeprefix('torch.')}: links carry {names}")
    return DTYPES.index(dtype)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory; from a GPU in pinned memory, which torch keeps and reuses."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor in host memory as bytes; of a copy if it is not contiguous."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _checksum(fields: bytes | memoryview, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(fields))
