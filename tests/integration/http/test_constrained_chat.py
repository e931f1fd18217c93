"""Formats and tool choices of chat completions, through the job service and an engine over a fake stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.http.core.backend import Backend
from cluster.text.tools.formats import ToolFormat
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.http import bench_backend, post

pytest.importorskip("llguidance", reason="llguidance comes with the extra http")
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "turn",
            "parameters": {"type": "object", "properties": {"side": {"enum": ["left"]}}, "required": ["side"],
                           "additionalProperties": False},
        },
    },
]  # fmt: skip


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    with bench_backend(tmp_path) as made:
        yield made


def ask(backend: Backend, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    return post(backend, "/v1/chat/completions", messages=messages, max_tokens=200, **body)


@pytest.mark.parametrize(("name", "arguments"), [("now", {}), ("turn", {"side": "left"})])
@pytest.mark.parametrize("form", [ToolFormat.QWEN3_JSON, ToolFormat.QWEN3_XML])
def test_a_named_tool_is_called(
    backend: Backend, form: ToolFormat, name: str, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRuntime, "tool_format", form)
    answer = ask(backend, tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls", choice
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == name
    assert json.loads(call["function"]["arguments"]) == arguments
    assert not (choice["message"]["content"] or "").strip()


def test_an_answer_matches_its_schema(backend: Backend) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", 1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(backend, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["choices"][0]["message"]["content"])["a"] in ("x", 1)


@pytest.mark.parametrize("form", [ToolFormat.QWEN3_JSON, ToolFormat.QWEN3_XML, ToolFormat.NONE])
def test_an_answer_beside_tools_is_a_call_or_matches_its_schema(
    backend: Backend, form: ToolFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRuntime, "tool_format", form)
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = ask(backend, tools=TOOLS, response_format=format_)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert message.get("tool_calls") or json.loads(message["content"]) == {"a": 1}
    schema["not"] = {}
    refused = ask(backend, tools=TOOLS, response_format=format_)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


def test_what_cannot_be_compiled_is_refused_by_field_and_keyword(backend: Backend) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    described = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for body, param in (
        ({"response_format": described}, "response_format"), ({"structured_outputs": {"json": schema}}, "structured_"),
    ):  # fmt: skip
        refused = ask(backend, **body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith(param)
        assert "not at #/properties/a" in refused.json()["error"]["message"]


def test_a_model_without_a_form_of_calls_cannot_be_made_to_call(backend: Backend) -> None:
    refused = ask(backend, tools=TOOLS, tool_choice="required")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
