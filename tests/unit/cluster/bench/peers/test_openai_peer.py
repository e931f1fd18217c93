"""A server as a peer: what is sent, what is read, what it refuses. `urlopen` is a fake."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from typing import Any

import pytest

from cluster.bench.peers.openai_peer import KEY_VARIABLE, OpenAiPeer, read_stream
from protos.errors import UserError

URL = "http://127.0.0.1:9/v1"
TOKENS = [{"choices": [{"text": " a"}]}, {"choices": [{"text": ""}]}, {"choices": [{"text": " b"}]},
          {"choices": [{"text": "", "finish_reason": "length"}]}]  # fmt: skip


def stream(*events: dict[str, Any]) -> io.BytesIO:
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return io.BytesIO(b": hello\n\n" + b"".join(lines) + b"data: [DONE]\n\n")


def refusal(code: int, text: str) -> urllib.error.HTTPError:
    return urllib.error.HTTPError(URL, code, "", Message(), io.BytesIO(text.encode()))


class Server:
    """Answers in turn; an exception is raised. Notes what was asked."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.requests: list[urllib.request.Request] = []

    def __call__(self, request: urllib.request.Request, timeout: float) -> Any:
        self.requests.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def body(self, number: int) -> dict[str, Any]:
        return dict(json.loads(self.requests[number].data))  # type: ignore[arg-type]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def install(*answers: Any) -> Server:
        server = Server(*answers)
        monkeypatch.setattr(urllib.request, "urlopen", server)
        return server

    return install


def clock(*moments: float) -> Any:
    at = iter(moments)
    return lambda: next(at)


def test_times_of_tokens_and_the_usage():
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    times, found = read_stream(stream(*TOKENS, usage), clock(1.0, 2.0, 3.5))
    assert times == [1.0, 2.0, 3.5]
    assert found == {"completion_tokens": 3}


def test_a_prompt_of_ids_is_measured(serve: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    server = serve(stream(*TOKENS, {"choices": [], "usage": {"completion_tokens": 5}}))
    found = OpenAiPeer("server", URL + "/", "m", clock(10.0, 12.0, 12.1, 14.0)).measure([7, 8, 9], 4)
    assert found == {"first_token_s": 2.0, "tokens": 5, "decode_ms": 500.0}
    body = server.body(0)
    assert (body["prompt"], body["max_tokens"], body["model"], body["ignore_eos"]) == ([7, 8, 9], 5, "m", True)
    assert server.requests[0].full_url == f"{URL}/completions"
    assert server.requests[0].get_header("Authorization") == "Bearer secret"


def test_what_a_server_does_not_know_is_left_out_from_then_on(serve: Any):
    server = serve(refusal(400, "unknown field ignore_eos"), stream(*TOKENS), stream(*TOKENS))
    peer = OpenAiPeer("server", URL, "m")
    for _ in range(2):
        assert peer.measure([7], 2)["tokens"] == 3
    assert ["ignore_eos" in server.body(n) for n in range(3)] == [True, False, False]
    assert all("stream_options" in server.body(n) for n in range(3))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusal(400, "prompt is\ntoo long"), "peers: server: .*/completions: 400: prompt is too long"),
        (refusal(401, "no key"), "401: no key"),
        (urllib.error.URLError("refused"), "cannot be reached .* start the server first"),
        (stream(), "no token came"),
    ],
)
def test_failures_are_one_line(answer: Any, expected: str, serve: Any):
    serve(answer)
    with pytest.raises(UserError, match=expected) as caught:
        OpenAiPeer("server", URL, "m").measure([7], 2)
    assert "\n" not in str(caught.value)


def test_the_model_is_the_first_that_is_listed(serve: Any):
    serve(io.BytesIO(b'{"data": [{"id": "first"}, {"id": "second"}]}'))
    assert OpenAiPeer("server", URL, "").model == "first"
    serve(io.BytesIO(b'{"data": []}'))
    with pytest.raises(UserError, match="lists no model"):
        OpenAiPeer("server", URL, "")
