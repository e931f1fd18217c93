"""Write server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.http.core.errors import to_api_error


def event(data: Mapping[str, Any], name: str | None = None, number: int | None = None) -> bytes:
    """Return one event.

    Args:
        number: its id, by which a client says where it wants to go on.
    """
    head = f"id: {number}\n" if number is not None else ""
    head += f"event: {name}\n" if name else ""
    return head.encode() + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """Return one event that has its `type` as its name too."""
    return f"event: {data['type']}\n".encode() + event(data)


def error_event(error: Exception) -> bytes:
    """Return an error as an event."""
    return event(to_api_error(error).body)
