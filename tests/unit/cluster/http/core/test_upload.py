"""Bodies that reach a thread piece by piece, and what becomes of those that end before their time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Request

from cluster.access.call_pool import Caller
from cluster.http.core import body
from cluster.http.core.calls import HttpCall
from cluster.http.core.errors import ApiError
from cluster.http.core.upload import receive
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend

PIECE = {"type": "http.request", "body": b"abc", "more_body": True}
END = {"type": "http.request", "body": b"d", "more_body": False}


def join(pieces: Iterator[bytes]) -> bytes:
    return b"".join(pieces)


def receiving(messages: list[Any], take: Any = join) -> Any:
    """What `take` makes of a body that comes in these messages; None: nothing more comes."""

    async def run() -> Any:
        backend = make_backend(FakeJobService())
        left = iter(messages)

        async def get() -> Any:
            message = next(left)
            if message is None:
                await asyncio.sleep(60)
            return message

        scope: dict[str, Any] = {"type": "http", "headers": []}
        call = HttpCall(backend, Caller("a", "b"))
        call.attach(scope)
        try:
            with call.place():
                async with asyncio.timeout(0.3):
                    return await receive(backend, Request(scope, get), take)
        finally:
            assert not len(backend.streams)
            backend.close()

    return asyncio.run(run())


def test_pieces_arrive_one_by_one() -> None:
    assert receiving([PIECE, PIECE, END], lambda pieces: [*pieces]) == [b"abc", b"abc", b"d", b""]


def test_a_body_that_is_cut_off_is_no_shorter_body() -> None:
    with pytest.raises(ApiError, match="cut off"):
        receiving([PIECE, {"type": "http.disconnect"}])


def test_an_error_of_the_function_ends_the_upload() -> None:
    def take(pieces: Iterator[bytes]) -> None:
        next(pieces)
        raise ApiError(400, "too long")

    with pytest.raises(ApiError, match="too long"):
        receiving([PIECE, None], take)


def test_a_thread_does_not_wait_for_a_request_that_has_ended() -> None:
    problems: list[Exception] = []
    ended = threading.Event()

    def take(pieces: Iterator[bytes]) -> None:
        try:
            join(pieces)
        except ApiError as error:
            problems.append(error)
            ended.set()
            raise

    with pytest.raises(TimeoutError):
        receiving([PIECE, None], take)
    assert ended.wait(10)
    assert "before its time" in str(problems[0])


def test_a_body_that_trickles_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_SLOW_S", 0.0)
    monkeypatch.setattr(body, "_SLOW_RATE", 1 << 40)
    with pytest.raises(ApiError, match="a second") as caught:
        receiving([PIECE, END])
    assert caught.value.status == 408
