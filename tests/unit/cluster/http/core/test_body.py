"""Bodies: what is too long or too much, and what is wrong with the rest; nothing makes the head fail."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.http.anthropic.messages_request import MessagesRequest
from cluster.http.core import body as body_module
from cluster.http.core.body import parse
from cluster.http.core.errors import ApiError
from cluster.http.openai.chat_request import ChatRequest
from cluster.http.openai.completions import CompletionRequest
from tests.support.rigs.http import AnsweringService, direct_client

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/v1/messages",
    "/v1/messages/count_tokens",
)


def post(path: str, content: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        with direct_client(AnsweringService()) as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"messages": "\\ud800"}', b"[" * 100_000, b"{}",
    b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"a": NaN}',
])  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_request_is_refused(path: str, content: bytes) -> None:
    answer = post(path, content)
    assert answer.status_code == 400
    more = set() if path.startswith("/v1/messages") else {"param", "code"}
    assert set(answer.json()["error"]) == {"message", "type"} | more


@pytest.mark.parametrize("declared", ["99999999999", "-1", "x", "1" * 5000])
def test_a_declared_size_that_is_too_large_is_refused_before_reading(declared: str) -> None:
    async def pieces() -> Any:
        raise AssertionError("was read")
        yield b""

    answer = post("/v1/chat/completions", pieces(), {"Content-Length": declared})
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


def test_a_body_without_a_size_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module.read_model, "__defaults__", (1000,))

    async def pieces() -> Any:
        for _ in range(100):
            yield b" " * 100

    assert post("/v1/chat/completions", pieces()).status_code == 413


def test_all_bodies_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_MAX_ALL_BYTES", 1000)
    before = body_module._memory.size
    refused = post("/v1/chat/completions", b" " * 2000)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert body_module._memory.size == before


def test_a_long_text_may_have_anything_in_it() -> None:
    text = '{[",\\"\n' * 400_000
    request = parse(ChatRequest, json.dumps({"messages": [{"role": "user", "content": text}]}).encode())
    assert request.messages[0].content == text
    ids = list(range(300_000))
    assert parse(CompletionRequest, json.dumps({"prompt": ids}).encode()).prompt == ids


@pytest.mark.parametrize("body", [b'\\"' * (1 << 20), b'"' + b'\\"' * (1 << 20), b'"' * (1 << 17), b'"\\' * (1 << 20)])
def test_texts_without_an_end_are_read_once(body: bytes) -> None:
    """All other requests would wait for as long."""
    began = time.process_time()
    with pytest.raises(ApiError):
        parse(ChatRequest, body)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("part", ['{"role":"user","content":"x"}', "[]", "{}", '""'])
def test_too_many_objects_are_refused_before_they_are_made(part: str) -> None:
    content = '{"messages":[' + ",".join([part] * (2_000_000 // len(part))) + "]}"
    with pytest.raises(ApiError, match="at most 65536"):
        parse(ChatRequest, content.encode())


WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "tool",
        "text",
        "type",
        "document",
        "tool_result",
        "a",
        "",
        "\x00",
        "<|im_end|>",
        "none",
        "auto",
        "é😀",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.just("content"), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *MessagesRequest.model_fields, "tokens"})
CONTENT = WORDS | st.lists(VALUES, max_size=2) | VALUES
MESSAGES = st.lists(st.fixed_dictionaries({"role": WORDS, "content": CONTENT}), max_size=2)
KNOWN = st.fixed_dictionaries({}, optional={
    "messages": MESSAGES | VALUES, "prompt": WORDS | st.lists(st.integers(0, 300), max_size=3) | VALUES,
})  # fmt: skip
MORE = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)
RIGHT = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "tokens": [5], "max_tokens": 2}
BODIES = st.builds(lambda more, known: {**RIGHT, **more, **known}, MORE, KNOWN | st.just({}))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), BODIES), min_size=4, max_size=4))
def test_no_body_makes_the_head_fail(requests: list[tuple[str, dict[str, Any]]]) -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            for path, body in requests:
                answer = await client.post(path, content=json.dumps(body))
                assert answer.status_code in (200, 400, 404), (path, body, answer.text)

    asyncio.run(run())
