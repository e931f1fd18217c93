"""Write server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.http.core.errors import to_api_error


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: Exception) -> bytes:
    """Return an error as an event."""
    return event(to_api_error(error).body)
