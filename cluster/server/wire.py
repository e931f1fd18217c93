"""Bounds of requests before they are parsed: 64 MiB of two-byte fields would be gigabytes of objects."""

from __future__ import annotations

from typing import Any

from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb

MAX_SMALL_BYTES = 256 << 10  # of requests that carry neither a prompt nor a document
MAX_FIELDS = 1 << 14  # of a submission, those of its parts included; packed token ids are one
_JOBS = pb.DESCRIPTOR.services_by_name["Jobs"]
_SUBMIT = f"/{_JOBS.full_name}/Submit"
_PIECES = frozenset(  # of messages that come in pieces
    f"/{_JOBS.full_name}/{name}" for name in ("UploadDocument", "AppendDocument", "ImportDocument", "CountTokens")
)


def check_raw(method: str, data: bytes) -> None:
    """Refuse a message that is too large for its method, or has too many fields (InvalidRequest).

    Args:
        method: path of the method.
        data: the message as it came; whether it can be parsed is not judged.
    """
    if method == _SUBMIT:
        _count_fields(data, 0, len(data), pb.SubmitRequest.DESCRIPTOR, MAX_FIELDS)
    elif method not in _PIECES and len(data) > MAX_SMALL_BYTES:
        raise InvalidRequest(f"request: {len(data)} bytes: must be at most {MAX_SMALL_BYTES}")


def _count_fields(data: bytes, at: int, end: int, message: Any, left: int) -> int:
    """Return how many fields are still allowed after those of a message, of this descriptor, at `data[at:end]`."""
    while at < end:
        if not left:
            raise InvalidRequest(f"request: must have at most {MAX_FIELDS} fields (token ids packed)")
        left -= 1
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            size, at = _varint(data, at)
            field = message.fields_by_number.get(number)
            if field is not None and field.message_type is not None:
                left = _count_fields(data, at, min(at + size, end), field.message_type, left)
            at += size
    return left


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (value, position after it); what does not end counts as far as it goes."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            break
    return value, at
