"""Tensors as frames: a header of 64 bytes and up to 2 MiB of the tensor each, the same bytes on every kind of link.

A tensor of one step is cut into `count` frames, sent in order. The receiver checks a header before it makes room for
what follows, and a checksum over both before anyone sees the tensor. No pickle.

Header, little-endian: CRC-32 of all that follows it (uint32), payload bytes (uint32), step (uint64), index and count
(uint32), type and number of dimensions (uint8), 6 unused bytes, shape of the whole tensor (4 x uint64).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

MAX_PAYLOAD = 2 * 1024 * 1024
MAX_TENSOR = 4 * 1024**3  # bytes; more in one step is a broken message
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64)  # by their number on the wire; int64: token ids
_MAX_DIMENSIONS = 4
_CRC = struct.Struct("<I")
_FIELDS = struct.Struct("<IQIIBB6x4Q")
HEADER_BYTES = _CRC.size + _FIELDS.size


class FrameError(RuntimeError):
    """A frame is damaged or does not continue the tensor before it."""


class Frame(NamedTuple):
    """What travels: a header, and its payload, a view of the tensor in host memory."""

    header: bytes
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself."""

    step: int
    index: int  # 0 .. count - 1
    count: int  # frames of the tensor
    dtype: int  # index into DTYPES
    shape: tuple[int, ...]  # of the whole tensor
    size: int  # bytes of the payload

    def pack(self, payload: bytes | memoryview) -> bytes:
        """Return the header as it travels, with the checksum of itself and the payload."""
        shape = (*self.shape, *[0] * (_MAX_DIMENSIONS - len(self.shape)))
        fields = _FIELDS.pack(self.size, self.step, self.index, self.count, self.dtype, len(self.shape), *shape)
        return _CRC.pack(_checksum(fields, payload)) + fields

    @classmethod
    def unpack(cls, header: bytes | bytearray | memoryview) -> Header:
        """Read a header.

        Raises:
            FrameError: the tensor has too many dimensions.
        """
        size, step, index, count, dtype, dimensions, *shape = _FIELDS.unpack_from(header, _CRC.size)
        if dimensions > _MAX_DIMENSIONS:
            raise FrameError(f"step {step}: a tensor of {dimensions} dimensions: must be at most {_MAX_DIMENSIONS}")
        return cls(step, index, count, dtype, tuple(shape[:dimensions]), size)


def split(tensor: torch.Tensor, step: int, max_payload: int = MAX_PAYLOAD) -> Iterator[Frame]:
    """Cut a tensor into frames; an empty tensor is one empty frame.

    Payloads are views of the tensor if it is contiguous in host memory, so it must not change before they are sent.

    Raises:
        ValueError: links do not carry its type.
    """
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"dtype: {str(tensor.dtype).removeprefix('torch.')}: links carry {names}")
    dtype, shape, data = DTYPES.index(tensor.dtype), tuple(tensor.shape), _bytes_of(tensor.detach().cpu())
    count = max(1, -(-len(data) // max_payload))

    def frame(index: int) -> Frame:
        payload = data[index * max_payload : (index + 1) * max_payload]
        return Frame(Header(step, index, count, dtype, shape, len(payload)).pack(payload), payload)

    return map(frame, range(count))


class Assembler:
    """Puts the frames of one link together again."""

    def __init__(self) -> None:
        self._first: Header | None = None  # of the tensor that is incomplete
        self._tensor = torch.empty(0)
        self._room = memoryview(b"")  # the bytes of that tensor
        self._filled = 0  # of them
        self._next = 0  # index of the frame that is due
        self._header = b""  # of the frame that is read
        self._payload = memoryview(b"")

    def begin(self, header: bytes | bytearray | memoryview) -> memoryview:
        """Check a header and return the room for its payload, to be filled before `end`.

        Raises:
            FrameError: it does not continue what came before, or the tensor would be too large.
        """
        frame = Header.unpack(header)
        if frame.index == 0:
            self._begin_tensor(frame)
        first = self._first
        if first is None or frame.index != self._next:
            raise FrameError(f"step {frame.step}: frame {frame.index} where {self._next} was due")
        if (frame.step, frame.count, frame.dtype, frame.shape) != (first.step, first.count, first.dtype, first.shape):
            raise FrameError(f"step {frame.step}: frame {frame.index} belongs to another tensor")
        room = self._room[self._filled : self._filled + frame.size]
        if len(room) < frame.size:
            raise FrameError(f"step {frame.step}: more bytes than the shape {list(frame.shape)} holds")
        self._header, self._payload = bytes(header), room
        return room

    def end(self) -> tuple[int, torch.Tensor] | None:
        """Check the payload; returns (step, tensor) with the last frame of a tensor.

        Raises:
            FrameError: the checksum differs, or bytes are missing.
        """
        first = self._first
        assert first is not None, "begin comes first"
        if _CRC.unpack_from(self._header)[0] != _checksum(self._header[_CRC.size :], self._payload):
            raise FrameError(f"step {first.step}: frame {self._next} of {first.count} is damaged (checksum differs)")
        self._filled, self._next = self._filled + len(self._payload), self._next + 1
        if self._next < first.count:
            return None
        if self._filled != len(self._room):
            raise FrameError(f"step {first.step}: {self._filled} bytes where the shape needs {len(self._room)}")
        self._first = None
        self._next = 0
        return first.step, self._tensor

    def add(self, frame: bytes) -> tuple[int, torch.Tensor] | None:
        """Take a frame that is here as a whole: `begin` and `end`.

        Raises:
            FrameError: see there, or the payload has another length than its header says.
        """
        if len(frame) < HEADER_BYTES:
            raise FrameError(f"a frame of {len(frame)} bytes: must be at least {HEADER_BYTES}")
        payload = memoryview(frame)[HEADER_BYTES:]
        room = self.begin(frame[:HEADER_BYTES])
        if len(payload) != len(room):
            raise FrameError(f"a frame of {len(payload)} bytes of payload where its header has {len(room)}")
        room[:] = payload
        return self.end()

    def _begin_tensor(self, frame: Header) -> None:
        if self._first is not None:
            raise FrameError(f"step {frame.step} begins before step {self._first.step} is complete")
        if frame.dtype >= len(DTYPES):
            raise FrameError(f"step {frame.step}: unknown dtype {frame.dtype}")
        dtype = DTYPES[frame.dtype]
        # the largest dimension too: beside a zero, one of any size holds no bytes
        size = max(math.prod(frame.shape) * dtype.itemsize, *frame.shape, 0)
        if size > MAX_TENSOR or frame.count > MAX_TENSOR // MAX_PAYLOAD + 1:
            raise FrameError(f"step {frame.step}: shape {list(frame.shape)} in {frame.count} frames is too large")
        if not frame.count:
            raise FrameError(f"step {frame.step}: a tensor in 0 frames: must be at least 1")
        self._first = frame
        self._tensor = torch.empty(frame.shape, dtype=dtype)
        self._room = _bytes_of(self._tensor)
        self._filled = 0


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor in host memory as bytes; of a copy if it is not contiguous."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _checksum(fields: bytes, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(fields))
