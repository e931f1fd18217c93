"""Budgets of reasoning and fewest tokens over HTTP, through the job service and an engine over a fake stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.http.core.backend import Backend
from tests.support.data.tokenizers import NEEDLE
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.http import bench_backend, post

OPEN = NEEDLE.encode("<think>", literal=True)
WORD = NEEDLE.encode("so", literal=True, continues=True)[0]
SAID = "soso Considering the limited time by the user, I have to give the solution based on the thinking directly now."
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The model opens its reasoning, and never ends it."""
    script = staticmethod(lambda sequence, index: OPEN[index] if index < len(OPEN) else WORD)
    monkeypatch.setattr(FakeRuntime, "script", script)
    with bench_backend(tmp_path) as made:
        yield made


def ask(backend: Backend, path: str, **body: Any) -> httpx.Response:
    answer = post(backend, path, max_tokens=100, **body)
    assert answer.status_code == 200, answer.text
    return answer


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("field", ["thinking_token_budget", "thinking_budget"])
def test_chat(backend: Backend, field: str) -> None:
    body = ask(backend, "/v1/chat/completions", messages=USER, **{field: 2}).json()
    message = body["choices"][0]["message"]
    assert message["reasoning"].split() == SAID.split()
    assert set(message["content"].replace("so", "")) == set()
    streamed = events(ask(backend, "/v1/chat/completions", messages=USER, stream=True, **{field: 2}))
    deltas = [event["choices"][0]["delta"] for event in streamed]
    for name in ("reasoning", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]


def test_no_budget_is_an_empty_block(backend: Backend) -> None:
    message = ask(backend, "/v1/chat/completions", messages=USER, thinking_token_budget=0).json()["choices"][0]
    assert "reasoning" not in message["message"]
    assert message["message"]["content"].startswith("soso")


def test_other_protocols(backend: Backend) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2}
    blocks = ask(backend, "/v1/messages", messages=USER, thinking=thinking).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[0]["thinking"].split() == SAID.split()
    items = ask(backend, "/v1/responses", input="hi", thinking_token_budget=2, max_output_tokens=100).json()["output"]
    assert [item["type"] for item in items] == ["reasoning", "message"]
    text = ask(backend, "/v1/completions", prompt="a", thinking_token_budget=2).json()["choices"][0]["text"]
    assert "directly now.\n</think>so" in text


def test_stop_strings_wait_for_the_fewest_tokens(backend: Backend) -> None:
    asked = {"messages": USER, "thinking_token_budget": 0, "stop": "os"}
    short = ask(backend, "/v1/chat/completions", **asked).json()
    long = ask(backend, "/v1/chat/completions", **asked, min_tokens=60).json()
    assert short["choices"][0]["finish_reason"] == long["choices"][0]["finish_reason"] == "stop"
    assert long["usage"]["completion_tokens"] == 61
    assert short["usage"]["completion_tokens"] < 60
