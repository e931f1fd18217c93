"""Errors of gRPC as the client's types, and which calls are worth another try."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

import cluster
from cluster.client.connection import Connection
from cluster.client.transport import Transport

Code = grpc.StatusCode
CLOSED = "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:7777: Socket closed"
WRONG_NAME = "failed to connect to all addresses; last error: UNKNOWN: x: Hostname Verification Check failed."


class Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str = "", **trailing: str) -> None:
        super().__init__()
        self.code = lambda: code
        self.details = lambda: details
        self.trailing_metadata = lambda: tuple((name.replace("_", "-"), value) for name, value in trailing.items())


def transport(**arguments: Any) -> Transport:
    return Transport(Connection(**arguments))


ERRORS: list[tuple[Failure, type[Exception], str]] = [
    (Failure(Code.INVALID_ARGUMENT, "top_k:\n5"), cluster.InvalidRequest, "top_k: 5"),
    (Failure(Code.NOT_FOUND), cluster.NotFound, "not_found"),
    (Failure(Code.ALREADY_EXISTS, "used"), cluster.Conflict, "used"),
    (
        Failure(Code.UNAUTHENTICATED, "no"),
        cluster.Unauthenticated,
        "127.0.0.1:7777: an API key is needed: set LONGREACH",
    ),
    (Failure(Code.RESOURCE_EXHAUSTED), cluster.Busy, "the queue is full"),
    (
        Failure(Code.RESOURCE_EXHAUSTED, "message larger than max"),
        cluster.InvalidRequest,
        "request: message larger than",
    ),
    (
        Failure(Code.DEADLINE_EXCEEDED),
        cluster.Unavailable,
        "127.0.0.1:7777: did not answer in time; a larger timeout_s",
    ),
    (
        Failure(Code.UNAVAILABLE, "gone"),
        cluster.Unavailable,
        "127.0.0.1:7777: cannot be reached (gone): is a head running",
    ),
    (
        Failure(Code.UNAVAILABLE, "job store: database is locked", retry_after_ms="5000"),
        cluster.Unavailable,
        "127.0.0.1:7777: job store: database is locked",
    ),
    (Failure(Code.UNAVAILABLE, CLOSED), cluster.TlsError, "127.0.0.1:7777: the connection was closed before an answer"),
    (Failure(Code.UNAVAILABLE, WRONG_NAME), cluster.TlsError, "127.0.0.1:7777: failed to connect to all addresses;"),
    (Failure(Code.CANCELLED, "CANCELLED"), cluster.Unavailable, "127.0.0.1:7777: the call was ended by the head"),
    (Failure(Code.DEADLINE_EXCEEDED, "idle upload"), cluster.Unavailable, "127.0.0.1:7777: idle upload"),
    (Failure(Code.NOT_FOUND, "a\x1b[2J\u202e"), cluster.NotFound, r"a\x1b[2J\u202e"),
    (
        Failure(Code.UNIMPLEMENTED, "Method not found!"),
        cluster.LongreachError,
        "127.0.0.1:7777: the head does not know",
    ),
    (Failure(Code.INTERNAL, "oops"), cluster.LongreachError, "127.0.0.1:7777: INTERNAL: oops"),
]


@pytest.mark.parametrize(("failure", "kind", "said"), ERRORS, ids=[kind.__name__ for _, kind, _ in ERRORS])
def test_types(monkeypatch: pytest.MonkeyPatch, failure: Failure, kind: type[Exception], said: str) -> None:
    monkeypatch.delenv("LONGREACH_API_KEY", raising=False)
    error = transport().typed_error(failure)
    assert type(error) is kind
    assert str(error).startswith(said)
    assert len(str(error).splitlines()) == 1


def test_a_key_that_is_wrong_is_not_named() -> None:
    error = transport(api_key="k" * 32).typed_error(Failure(Code.PERMISSION_DENIED))
    assert str(error).startswith(
        "127.0.0.1:7777: the API key that was given is not one of the head's: set LONGREACH_API"
    )
    assert "kkkk" not in str(error)


def test_busy_says_when() -> None:
    error = transport().typed_error(Failure(Code.RESOURCE_EXHAUSTED, retry_after_ms="2500"))
    assert isinstance(error, cluster.Busy)
    assert error.retry_after_s == 2.5


def test_a_head_that_has_answered_is_no_matter_of_tls() -> None:
    answered = transport()
    answered.has_answered = True
    assert type(answered.typed_error(Failure(Code.UNAVAILABLE, CLOSED))) is cluster.Unavailable


@pytest.mark.parametrize("code", list(Code))
def test_only_what_cannot_be_reached_is_tried_again(code: grpc.StatusCode) -> None:
    assert transport().is_transient(Failure(code, CLOSED)) == (code is Code.UNAVAILABLE)
    assert not transport().is_transient(Failure(code, WRONG_NAME))


def test_channels_by_kind() -> None:
    blocking = transport(ca_file="", server_name="x")
    assert isinstance(blocking._channel, grpc.Channel)
    blocking.close()

    async def open_and_close() -> None:
        opened = Transport(Connection(), is_async=True)
        assert isinstance(opened._channel, grpc.aio.Channel)
        await opened.close()

    asyncio.run(open_and_close())
    with pytest.raises(cluster.InvalidRequest, match="ca_file: /nowhere: cannot be read"):
        transport(ca_file="/nowhere")


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("2500", 2.5), ("", 1.0), ("-1", 1.0), ("soon", 1.0), ("1e9", 1.0), ("9" * 15, 3600.0), ("9" * 5000, 1.0)],
)
def test_a_time_to_wait_is_bounded(said: str, seconds: float) -> None:
    error = transport().typed_error(Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after_ms=said))
    assert isinstance(error, cluster.Busy)
    assert error.retry_after_s == seconds
