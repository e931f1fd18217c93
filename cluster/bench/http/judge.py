"""What a server may answer: never a fault of its own, and every error as an object of the protocol."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import unquote

_ANTHROPIC = "/v1/messages"
_PIECE = 64 << 10


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: None when nothing came that is HTTP.
        is_whole: False when we left before the end, as clients do.
    """

    status: int | None
    content_type: str = ""
    body: bytes = b""
    is_whole: bool = True


def exchange(host: str, port: int, raw: bytes, patience_s: float, half_close: bool = False) -> Answer:
    """Send a request on a connection of its own and return the answer, as far as it has come within `patience_s`.

    Args:
        half_close: say that nothing more comes, which servers take for the end of the connection.
    """
    end = time.monotonic() + patience_s
    with socket.create_connection((host, port), timeout=patience_s) as connection:
        try:
            connection.sendall(raw)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # the server has refused it before its end
            pass
        response = HTTPResponse(connection)
        body = b""
        try:
            response.begin()
            kind = response.headers.get("content-type", "")
            while piece := response.read1(_PIECE):
                body += piece
                if time.monotonic() > end:
                    return Answer(response.status, kind, body, is_whole=False)
        except TimeoutError:
            return Answer(None, is_whole=False)
        except (HTTPException, OSError):
            return Answer(None)
        finally:
            response.close()
        return Answer(response.status, kind, body)


def problem_of(path: str, answer: Answer) -> str | None:
    """Return what is wrong about an answer, None when all is well."""
    if answer.status is None:
        return None if not answer.is_whole else "no answer"
    if answer.status >= 500:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if answer.status >= 400:
        return _problem_of_error(path, answer)
    if not answer.content_type.startswith("text/event-stream"):
        return None
    if b"internal_error" in answer.body or b'"api_error"' in answer.body:
        return f"an internal error in a stream: {answer.body[-300:]!r}"
    path = path.partition("?")[0]
    if answer.is_whole and path in _LAST and not answer.body.endswith(_LAST[path]):
        return f"a stream without an end: {answer.body[-200:]!r}"
    return None


_LAST = {"/v1/chat/completions": b"data: [DONE]\n\n", "/v1/completions": b"data: [DONE]\n\n"}


def _problem_of_error(path: str, answer: Answer) -> str | None:
    shown = f"status {answer.status}: {answer.content_type}: {answer.body[:300]!r}"
    try:
        body: Any = json.loads(answer.body)
    except ValueError:
        return f"an error that is no JSON: {shown}"
    path = unquote(path).partition("?")[0]
    if isinstance(body, dict) and isinstance(body.get("error"), dict) and body["error"].get("code") == "not_http":
        path = ""  # nobody could read it
    if path == _ANTHROPIC or path.startswith(f"{_ANTHROPIC}/"):
        is_right = _texts(body, "type", error=("type", "message")) and body["type"] == "error"
    else:
        is_right = _texts(body, error=("type", "message")) and body["error"].keys() == {
            "message", "type", "param", "code"
        }  # fmt: skip
    return None if is_right else f"not an error object of the protocol: {shown}"


def _texts(body: Any, *names: str, error: tuple[str, ...]) -> bool:
    if not isinstance(body, dict) or not isinstance(body.get("error"), dict):
        return False
    texts = [body.get(name) for name in names] + [body["error"].get(name) for name in error]
    return all(isinstance(text, str) and text for text in texts)
