"""Tensors as frames: pieces of at most 2 MiB with sequence numbers and checksum. No pickle.

A tensor of one step is cut into `count` frames, sent in order. The receiver checks every field before it trusts a byte,
and reports what does not fit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

MAX_PAYLOAD = 2 * 1024 * 1024
MAX_TENSOR = 4 * 1024**3  # bytes; more in one step is a broken message
_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int64": torch.int64,  # sampled tokens
}  # fmt: skip


class FrameError(RuntimeError):
    """A frame is damaged or does not continue the tensor before it."""


@dataclass(frozen=True, slots=True)
class Frame:
    step: int
    index: int
    count: int
    dtype: str
    shape: tuple[int, ...]
    crc32: int
    payload: bytes


def split(tensor: torch.Tensor, step: int, max_payload: int = MAX_PAYLOAD) -> Iterator[Frame]:
    """Cut a tensor into frames; an empty tensor is one empty frame."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype}: links carry {', '.join(_DTYPES)}")
    shape = tuple(tensor.shape)
    raw = memoryview(tensor.detach().cpu().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    count = max(1, -(-len(raw) // max_payload))
    for index in range(count):
        payload = bytes(raw[index * max_payload : (index + 1) * max_payload])
        yield Frame(step, index, count, dtype, shape, checksum(step, index, dtype, shape, payload), payload)


def checksum(step: int, index: int, dtype: str, shape: tuple[int, ...], payload: bytes) -> int:
    """CRC-32 over what the bytes are and the bytes: a payload taken for another type or place does not pass."""
    return zlib.crc32(payload, zlib.crc32(f"{step} {index} {dtype} {shape}".encode()))


class Assembler:
    """Puts the frames of one link together again."""

    def __init__(self) -> None:
        self._first: Frame | None = None
        self._data: np.ndarray | None = None
        self._next = 0
        self._filled = 0

    def add(self, frame: Frame) -> tuple[int, torch.Tensor] | None:
        """Take a frame; returns (step, tensor) with the last one of a tensor.

        Raises:
            FrameError: wrong checksum, shape or order.
        """
        if checksum(frame.step, frame.index, frame.dtype, frame.shape, frame.payload) != frame.crc32:
            raise FrameError(f"step {frame.step}: frame {frame.index} of {frame.count} is damaged (checksum differs)")
        if frame.index == 0:
            self._begin(frame)
        first, data = self._first, self._data
        if first is None or data is None or frame.index != self._next:
            raise FrameError(f"step {frame.step}: frame {frame.index} where {self._next} was due")
        if (frame.step, frame.count, frame.dtype, frame.shape) != (first.step, first.count, first.dtype, first.shape):
            raise FrameError(f"step {frame.step}: frame {frame.index} belongs to another tensor")
        stop = self._filled + len(frame.payload)
        if stop > data.size:
            raise FrameError(f"step {frame.step}: more bytes than the shape {list(frame.shape)} holds")
        data[self._filled : stop] = np.frombuffer(frame.payload, np.uint8)
        self._filled, self._next = stop, self._next + 1
        if self._next < frame.count:
            return None
        if self._filled != data.size:
            raise FrameError(f"step {frame.step}: {self._filled} bytes where the shape needs {data.size}")
        self._first = self._data = None
        self._next = 0
        if not data.size:  # torch cannot view an empty array as another type
            return frame.step, torch.empty(frame.shape, dtype=_DTYPES[frame.dtype])
        return frame.step, torch.from_numpy(data).view(_DTYPES[frame.dtype]).view(frame.shape)

    def _begin(self, frame: Frame) -> None:
        if self._first is not None:
            raise FrameError(f"step {frame.step} begins before step {self._first.step} is complete")
        if frame.dtype not in _DTYPES:
            raise FrameError(f"step {frame.step}: unknown dtype {frame.dtype[:20]!r}")
        size = math.prod(frame.shape) * _DTYPES[frame.dtype].itemsize
        widest = max(frame.shape, default=0)  # beside a zero, a dimension of any size holds no bytes
        if len(frame.shape) > 4 or max(size, widest) > MAX_TENSOR or frame.count > MAX_TENSOR // MAX_PAYLOAD + 1:
            raise FrameError(f"step {frame.step}: shape {list(frame.shape)[:8]} in {frame.count} frames is too large")
        if not frame.count:
            raise FrameError(f"step {frame.step}: a tensor in 0 frames: must be at least 1")
        self._first = frame
        self._data = np.empty(size, np.uint8)
        self._filled = 0
