"""What counts as a wrong answer."""

from __future__ import annotations

import json

import pytest

from cluster.bench.http.judge import Answer, problem_of

OPENAI = {"error": {"message": "m", "type": "t", "param": None, "code": None}}
ANTHROPIC = {"type": "error", "error": {"type": "t", "message": "m"}}
NOT_HTTP = {"error": {"message": "m", "type": "t", "param": None, "code": "not_http"}}
EVENTS = "text/event-stream; charset=utf-8"


def error(body: object, status: int = 400) -> Answer:
    return Answer(status, "application/json", json.dumps(body).encode())


@pytest.mark.parametrize(("path", "answer", "problem"), [
    ("/v1/jobs", error(OPENAI), None),
    ("/v1/jobs", error(ANTHROPIC), "not an error object"),
    ("/v1/messages?a=b", error(ANTHROPIC), None),
    ("/v1/messages/count_tokens", error(OPENAI), "not an error object"),
    ("/v1/messages", error(NOT_HTTP), None),
    ("/v1/jobs", error(OPENAI, 503), "status 503"),
    ("/v1/jobs", Answer(404, "text/plain", b"Not Found"), "no JSON"),
    ("/v1/jobs", error([1]), "not an error object"),
    ("/v1/jobs", Answer(None), "no answer"),
    ("/v1/jobs", Answer(None, is_whole=False), None),
    ("/v1/chat/completions", Answer(200, EVENTS, b"data: {}\n\ndata: [DONE]\n\n"), None),
    ("/v1/chat/completions", Answer(200, EVENTS, b"data: {}\n\n"), "without an end"),
    ("/v1/chat/completions", Answer(200, EVENTS, b"data: {}\n\n", is_whole=False), None),
    ("/v1/responses", Answer(200, EVENTS, b'data: {"code":"internal_error"}\n\n'), "internal error"),
    ("/v1/jobs", Answer(200, "application/json", b"{}"), None),
])  # fmt: skip
def test_problems(path: str, answer: Answer, problem: str | None) -> None:
    found = problem_of(path, answer)
    assert found is None if problem is None else problem in str(found)
