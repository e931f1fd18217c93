"""Server-sent events as text."""

from __future__ import annotations

import json

from cluster.http.core.errors import ApiError
from cluster.http.core.sse import error_event, event, named_event


def test_an_event_is_one_line_whatever_its_text() -> None:
    raw = event({"text": "a\r\nb\u2028€"})
    assert raw.startswith(b"data: ")
    assert raw.endswith(b"\n\n")
    assert raw.count(b"\n") == 2
    assert json.loads(raw.removeprefix(b"data: ")) == {"text": "a\r\nb\u2028€"}


def test_an_event_may_have_a_name() -> None:
    assert named_event({"type": "ping"}) == b'event: ping\ndata: {"type":"ping"}\n\n'


def test_an_error_is_an_event() -> None:
    assert json.loads(error_event(ApiError(429, "x", code="busy"))[6:])["error"]["code"] == "busy"
