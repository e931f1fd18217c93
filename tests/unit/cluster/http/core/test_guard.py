"""What the guard makes of errors and of calls that are ended; keys and origins are in test_app."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from cluster.access.call_pool import CallEnd
from cluster.http.core.guard import Guard
from cluster.jobs.model import ServiceBusy
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend

SCOPE = {"type": "http", "method": "GET", "path": "/x", "headers": [], "client": ("127.0.0.1", 5)}
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def pass_through(app: Any) -> list[dict[str, Any]]:
    """What is sent for one request that `app` answers."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def run() -> None:
        backend = make_backend(FakeJobService())
        await Guard(app, backend, None)(dict(SCOPE), receive, send)
        assert not len(backend.short)
        backend.close()

    asyncio.run(run())
    return sent


def test_an_error_before_the_response_has_a_status() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ServiceBusy("full", 3.0)

    start, body = pass_through(app)
    assert start["status"] == 429
    assert dict(start["headers"])[b"retry-after"] == b"3"
    assert json.loads(body["body"])["error"]["message"] == "full"


@pytest.mark.parametrize("started", [False, True])
def test_a_call_that_gives_way_says_so(started: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send(STREAM)
        scope["longreach.call"]._open.end(CallEnd.NO_ROOM, "others want its place")
        await asyncio.sleep(10)

    *_, start, body = pass_through(app)
    assert start["status"] == (200 if started else 429)
    assert b"others want its place" in body["body"]
    assert not body.get("more_body")
    assert body["body"].startswith(b'data: {"type":"error",') == started


def test_another_cancellation_is_not_swallowed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        pass_through(app)


def test_websockets_are_not_served() -> None:
    async def run() -> None:
        backend = make_backend(FakeJobService())
        guard: Any = Guard(None, backend, None)  # type: ignore[arg-type]
        await guard({"type": "websocket"}, None, None)
        backend.close()

    asyncio.run(run())
