"""Errors of the head as clients of OpenAI's protocols see them."""

from __future__ import annotations

import errno

import pytest

from cluster.common.errors import EngineError, JobStoreError, JobStoreFull
from cluster.http.core.errors import BUSY, TOO_LONG, ApiError, refuse, to_api_error
from cluster.jobs.model import (
    ContextTooLong,
    InvalidJob,
    JobConflict,
    JobNotFound,
    NotAllowedNow,
    NotReady,
    ServiceBusy,
)
from protos.errors import InvalidRequest


@pytest.mark.parametrize(("error", "status", "code"), [
    (InvalidRequest("top_p: 3: must be less"), 400, None),
    (InvalidJob("a b: c"), 400, None),
    (ContextTooLong("prompt: 9 tokens"), 400, "context_length_exceeded"),
    (JobNotFound("job: not found"), 404, "not_found"),
    (JobConflict("x"), 409, "conflict"),
    (NotAllowedNow("x"), 409, "conflict"),
    (ServiceBusy("x", 5.0), 429, "busy"),
    (NotReady("x", 5.0), 503, "not_ready"),
    (JobStoreFull("x"), 429, "disk_full"),
    (JobStoreError("x"), 503, "store_unavailable"),
    (OSError(errno.ENOSPC, "no room"), 429, "disk_full"),
    (EngineError("secret"), 500, "internal_error"),
    (ZeroDivisionError("secret"), 500, "internal_error"),
])  # fmt: skip
def test_every_error_has_a_status_and_a_code(error: Exception, status: int, code: str | None) -> None:
    shown = to_api_error(error)
    assert (shown.status, shown.code) == (status, code)
    assert set(shown.body["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in str(shown.body)
    assert ("Retry-After" in shown.headers) == (status in (429, 503))


def test_the_field_at_fault_has_its_name_in_the_protocol() -> None:
    assert to_api_error(InvalidRequest("top_p: 3: must be")).param == "top_p"
    assert to_api_error(InvalidRequest("messages[3].role: x")).param == "messages[3].role"
    assert to_api_error(ContextTooLong("prompt: 9 tokens"), {"prompt": "messages"}).param == "messages"
    assert to_api_error(InvalidRequest("nothing at all")).param is None
    assert refuse("n", "2: is not supported").body["error"]["message"] == "n: 2: is not supported"


def test_times_to_wait_are_whole_seconds_and_exact_ones() -> None:
    headers = ApiError(429, "busy", retry_after_s=0.25).headers
    assert headers == {"Retry-After": "1", "retry-after-ms": "250"}


def test_messages_are_one_printable_line_of_bounded_length() -> None:
    shown = ApiError(400, "a\r\nb" + "c" * 5000)
    assert "\n" not in shown.message
    assert len(shown.message) == 1000


def test_a_route_of_anthropics_protocol_has_errors_of_its_form() -> None:
    error = ApiError(429, "full", kind=BUSY, code="busy")
    shown = {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}}
    assert error.body_for("/v1/messages") == error.body_for("/v1/messages/count_tokens") == shown
    assert error.body_for("/v1/messages2") == error.body_for("/v1/chat/completions") == error.body
    assert ApiError(400, "x", code=TOO_LONG).body_for("/v1/messages")["error"]["message"] == "prompt is too long: x"
    assert ApiError(409, "x").body_for("/v1/messages")["error"]["type"] == "invalid_request_error"
