"""Frames of a link, whole and damaged in every way: what each kind of link must refuse."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import torch

from workers.transport.frames import MAX_TENSOR, Header, split

DIMENSIONS_AT = 25  # offset of the number of dimensions


def frames_of(size: int = 100, payload: int = 64, step: int = 5) -> list[bytes]:
    """The frames of float32 0, 1, 2, ... with payloads of `payload` bytes, as they travel."""
    return list(split(torch.arange(size, dtype=torch.float32), step, payload))


def sealed(frame: bytes) -> bytes:
    """The frame with a checksum that fits."""
    return struct.pack("<I", zlib.crc32(frame[4:])) + frame[4:]


def with_wrong_checksum(frame: bytes) -> bytes:
    return bytes([frame[0] ^ 1]) + frame[1:]


FIVE = frames_of(80)


def changed(frame: bytes, **fields: object) -> bytes:
    """The frame with other header fields, sealed again."""
    header, payload = Header.unpack(frame), frame[64:]
    return replace(header, **fields).pack(payload) + payload  # type: ignore[arg-type]


def _empty(**fields: object) -> bytes:
    """An empty tensor of the shape (0,)."""
    return changed(Header(1, 0, 1, 2, (0,), 0).pack(b""), **fields)


# name -> frames as they travel, with checksums that fit; the last one must not pass
DAMAGED: dict[str, list[bytes]] = {
    "swapped": [FIVE[0], FIVE[2]],
    "first missing": [FIVE[1]],
    "middle missing": [FIVE[0], FIVE[1], FIVE[3]],
    "last missing": [*FIVE[:4], frames_of(step=6)[0]],
    "duplicate first": [FIVE[0], FIVE[0]],
    "duplicate": [FIVE[0], FIVE[1], FIVE[1]],
    "duplicate last": [*FIVE, FIVE[4]],
    "another step": [FIVE[0], changed(FIVE[1], step=6)],
    "another shape": [FIVE[0], changed(FIVE[1], shape=(8, 10))],
    "another type": [FIVE[0], changed(FIVE[1], dtype=1)],
    "another count": [FIVE[0], changed(FIVE[1], count=6)],
    "count too small": [changed(frame, count=4) for frame in FIVE[:4]],
    "count too large": [*(changed(frame, count=6) for frame in FIVE), frames_of(step=6)[0]],
    "count zero": [changed(FIVE[0], count=0)],
    "count zero, empty": [_empty(count=0)],
    "shape too small": [changed(frame, shape=(79,)) for frame in FIVE],
    "shape too large": [changed(frame, shape=(81,)) for frame in FIVE],
    "huge shape": [changed(FIVE[0], shape=(MAX_TENSOR,))],
    "huge shape with a zero": [_empty(shape=(0, 2**64 - 1))],
    "huge empty shape": [_empty(shape=(2**63, 0))],
    "overflowing shape": [changed(FIVE[0], shape=(2**62, 2**62, 16))],
    "many dimensions": [sealed(FIVE[0][:DIMENSIONS_AT] + b"\x05" + FIVE[0][DIMENSIONS_AT + 1 :])],
    "huge count": [changed(FIVE[0], count=2**32 - 1)],
    "unknown type": [changed(FIVE[0], dtype=4)],
    "last type": [changed(FIVE[0], dtype=255)],
    "empty payload": [changed(FIVE[0][:64], size=0), FIVE[2]],
    "huge payload": [changed(FIVE[0], size=2**32 - 1)],
    "a flipped bit": [FIVE[0][:-1] + bytes([FIVE[0][-1] ^ 1])],
    "a wrong checksum": [with_wrong_checksum(FIVE[0])],
    "a wrong checksum later": [FIVE[0], with_wrong_checksum(FIVE[1])],
}
