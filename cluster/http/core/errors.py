"""One mapping from our errors to HTTP: status, `Retry-After`, and the error object of the protocol at hand."""

from __future__ import annotations

import errno
import logging
import math
import re
import secrets
import sqlite3
from collections.abc import Mapping
from typing import Any

from cluster.common.errors import JobStoreError, JobStoreFull
from cluster.common.text_format import escape_unprintable
from cluster.jobs.model import ContextTooLong, JobConflict, JobNotFound, NotAllowedNow, NotReady, ServiceBusy
from protos.errors import UserError

INVALID, BUSY, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
TOO_LONG = "context_length_exceeded"
_MAX_MESSAGE = 1000  # characters
_STORE_RETRY_S = 5.0  # of a store that cannot be used now
_KEY = re.compile(r"([A-Za-z_][\w.\[\]]*): ")
_log = logging.getLogger(__name__)
# Anthropic's protocol: where it is spoken, its types of errors, and how it begins to say that a prompt is too long,
# by which its clients decide to shorten the conversation
_ANTHROPIC = "/v1/messages"
_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip
_ANTHROPIC_TOO_LONG = "prompt is too long: "


class ApiError(Exception):
    """A request that is refused, as a client of OpenAI's protocols sees it."""

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            kind: `type` of the error object.
            param: field of the request that is at fault.
        """
        super().__init__(message)
        self.status = status
        self.message = escape_unprintable(message)[:_MAX_MESSAGE]
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that clients get."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def body_for(self, path: str) -> dict[str, Any]:
        """Return the JSON that clients of a route get, in the form of its protocol."""
        if path != _ANTHROPIC and not path.startswith(f"{_ANTHROPIC}/"):
            return self.body
        message = f"{_ANTHROPIC_TOO_LONG}{self.message}" if self.code == TOO_LONG else self.message
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: when to try again, in seconds and, for clients that know it, milliseconds."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            seconds = max(self.retry_after_s, 0.001)
            headers |= {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(round(seconds * 1000))}
        return headers


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error of a field that has a value we cannot honour; `message` follows its name."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def to_api_error(error: Exception, params: Mapping[str, str] | None = None) -> ApiError:
    """Return any error as clients see it; one that nobody foresaw has a reference to the log instead of its text.

    Args:
        params: names of fields in the protocol at hand, by the names that our messages begin with.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (OSError, sqlite3.Error)):
        error = _of_the_store(error)
    text = str(error)
    match error:
        case ContextTooLong():
            return ApiError(400, text, param=_param(text, params), code=TOO_LONG)
        case JobNotFound():
            return ApiError(404, text, code="not_found")
        case JobConflict() | NotAllowedNow():
            return ApiError(409, text, code="conflict")
        case ServiceBusy():
            return ApiError(429, text, kind=BUSY, code="busy", retry_after_s=error.retry_after_s)
        case NotReady():
            return ApiError(503, text, kind=SERVER, code="not_ready", retry_after_s=error.retry_after_s)
        case JobStoreFull():
            return ApiError(429, text, kind=BUSY, code="disk_full", retry_after_s=_STORE_RETRY_S)
        case JobStoreError():
            return ApiError(503, text, kind=SERVER, code="store_unavailable", retry_after_s=_STORE_RETRY_S)
        case UserError():  # InvalidRequest and InvalidJob among them
            return ApiError(400, text, param=_param(text, params))
    reference = secrets.token_hex(4)
    _log.error("a request over HTTP failed, reference %s", reference, exc_info=error)
    problem = f"internal error, reference {reference}: see the log of the head"
    return ApiError(500, problem, kind=SERVER, code="internal_error")


def _param(text: str, params: Mapping[str, str] | None) -> str | None:
    """Return the field that a message names first: ours all begin with `key: `."""
    match = _KEY.match(text)
    if match is None:
        return None
    key, known = match[1], params or {}
    return known.get(key) or known.get(re.split(r"[.\[]", key)[0], key)


def _of_the_store(error: Exception) -> JobStoreError:
    """Return an error of the disk or of SQLite that nobody has explained as one of the store."""
    kind = JobStoreFull if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else JobStoreError
    return kind(f"the head cannot do this now: {getattr(error, 'strerror', None) or error}")
