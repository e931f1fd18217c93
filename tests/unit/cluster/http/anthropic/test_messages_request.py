"""Anthropic's messages as clients send them, and what becomes of each field."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.http.anthropic.messages_request import MESSAGES_PARAMS, MessagesRequest, messages_spec
from cluster.http.core.backend import Backend
from cluster.http.core.body import parse
from cluster.http.core.errors import ApiError, to_api_error
from cluster.jobs.model import JobSpec
from protos.jobs.chat import ChatMessage, ToolCall, ToolChoice
from protos.jobs.constraint import Constraint
from tests.support.data.clients import claude_code
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend

USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}

MARK = {"type": "ephemeral"}
LONG_MARK = {**MARK, "ttl": "1h"}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_backend(FakeJobService())
    yield made
    made.close()


def spec_of(backend: Backend, **fields: Any) -> JobSpec:
    body = json.dumps({"max_tokens": 9, "messages": [USER], **fields}).encode()
    return messages_spec(backend, parse(MessagesRequest, body), backend.service.documents)


def refusal(backend: Backend, **fields: Any) -> ApiError:
    with pytest.raises(Exception) as caught:
        spec_of(backend, **fields)
    return to_api_error(caught.value, MESSAGES_PARAMS)


def messages_of(spec: JobSpec) -> tuple[ChatMessage, ...]:
    assert spec.input.messages is not None
    return spec.input.messages


def test_what_says_little_is_an_attached_job_without_reasoning(backend: Backend) -> None:
    spec = spec_of(backend)
    assert messages_of(spec) == (ChatMessage("user", "hi"),)
    assert (spec.attached, spec.shorten, spec.ask.max_tokens, spec.ask.enable_thinking) == (True, True, 9, False)
    assert spec.ask.sampling.temperature is None


def test_the_first_request_of_claude_code(backend: Backend) -> None:
    specs = [spec_of(backend, **claude_code.first_turn(billing)) for billing in ("fa690", "11111")]
    assert specs[0] == specs[1]  # so that its prefix is found
    system, user = messages_of(specs[0])
    assert system == ChatMessage("system", "You are Claude Code.\nBe concise.")
    assert user.content.endswith("</system-reminder>\nWhat is in a.txt?")
    assert [tool.name for tool in specs[0].input.tools] == ["Read", "Bash"]
    assert json.loads(specs[0].input.tools[0].parameters)["required"] == ["file_path"]
    assert (specs[0].ask.enable_thinking, specs[0].ask.max_tokens) == (True, 32000)
    assert specs[0].ask.thinking_budget == 31999


def test_a_later_request_of_claude_code(backend: Backend) -> None:
    _, _, assistant, *rest = messages_of(spec_of(backend, **claude_code.second_turn()))
    calls = (
        ToolCall("toolu_1", "Read", '{"file_path": "/a.txt"}'),
        ToolCall("toolu_2", "Bash", '{"command": "cat b.txt"}'),
    )
    assert assistant == ChatMessage("assistant", "Let me look.", "I should read it.", calls)
    assert rest == [
        ChatMessage("tool", "     1\thello", tool_call_id="toolu_1"),
        ChatMessage("tool", "cat: b.txt: No such file", tool_call_id="toolu_2"),
        ChatMessage("user", "<system-reminder>Go on.</system-reminder>"),
    ]


@pytest.mark.parametrize("system", [
    "x-anthropic-billing-header: a=1;\nBe kind.", "Be kind.",
    [{"type": "text", "text": "x-anthropic-billing-header: a=1;\nBe kind."}],
    [{"type": "text", "text": "X-Anthropic-Billing-Header: b"}, {"type": "text", "text": "Be kind."}],
])  # fmt: skip
def test_the_billing_line_is_left_out(backend: Backend, system: Any) -> None:
    assert messages_of(spec_of(backend, system=system))[0] == ChatMessage("system", "Be kind.")
    alone = spec_of(backend, system="x-anthropic-billing-header: a")
    assert [message.role for message in messages_of(alone)] == ["user"]


def test_documents_become_text_of_their_messages(backend: Backend) -> None:
    record = backend.service.add_document("stored.txt", [b"4711"], 100)
    blocks = [
        {"type": "document", "title": "one", "source": {"type": "text", "media_type": "text/plain", "data": "1"}},
        {"type": "document", "source": {"type": "base64", "data": base64.b64encode(b"2").decode()}, "context": "old"},
        {"type": "document", "source": {"type": "file", "file_id": f"file-{record.id.removeprefix('doc_')}"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "4"}]}},
        {"type": "text", "text": "Which?"},
    ]
    (message,) = messages_of(spec_of(backend, messages=[{"role": "user", "content": blocks}]))
    assert message.content == (
        "==> one <==\n1\n\n==> document <==\n2\nold\n\n==> stored.txt <==\n4711\n\n==> document <==\n4\n\nWhich?"
    )


@pytest.mark.parametrize(("choice", "expected"), [
    ({"type": "auto"}, ToolChoice()), ({"type": "any"}, ToolChoice("required")), ({"type": "none"}, ToolChoice("none")),
    ({"type": "tool", "name": "f"}, ToolChoice("named", "f")),
    ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(one_call=True)),
])  # fmt: skip
def test_tool_choice(backend: Backend, choice: dict[str, Any], expected: ToolChoice) -> None:
    spec = spec_of(backend, tools=[TOOL], tool_choice=choice)
    assert spec.input.tool_choice == expected
    assert (spec.ask.structured_outputs is not None) == (expected.mode in ("required", "named"))


def test_options(backend: Backend) -> None:
    spec = spec_of(
        backend, stop_sequences=["END"], temperature=0.5, top_k=4, top_p=0.5,
        thinking={"type": "adaptive", "budget_tokens": 9},
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}, metadata={"user_id": "u"},
    )  # fmt: skip
    assert (spec.ask.stop, spec.ask.sampling.top_k, spec.ask.enable_thinking) == (("END",), 4, True)
    assert spec.ask.thinking_budget == 9
    assert spec.ask.structured_outputs == Constraint("json_schema", '{"type": "object"}')


@pytest.mark.parametrize(("fields", "seconds"), [
    ({}, 0), ({"cache_control": MARK}, 300), ({"tools": [{**TOOL, "cache_control": MARK}]}, 300),
    ({"system": [{"type": "text", "text": "a", "cache_control": LONG_MARK}]}, 3600),
    ({"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "a", "cache_control": MARK}]}
    ]}]}, 300),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {
        "type": "content", "content": [{"type": "text", "text": "a", "cache_control": LONG_MARK}]
    }}]}]}, 3600),
])  # fmt: skip
def test_a_mark_protects_wherever_it_stands(backend: Backend, fields: dict[str, Any], seconds: int) -> None:
    assert spec_of(backend, **fields).cache_ttl_s == seconds


@pytest.mark.parametrize(("fields", "param"), [
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "b"}}]}]},
     "messages[0].content[0].cache_control.type"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": None}, "max_tokens"), ({"messages": []}, "messages"),
    ({"messages": [USER, {"role": "assistant", "content": "The"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url"}}]}]},
     "messages[0].content[0].source.type"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text"}}]}]},
     "messages[0].content[0].source"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"), ({"tools": [1]}, "tools[0]"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "perhaps"}}, "tool_choice.type"),
    ({"thinking": {"type": "much"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
    ({"stop_sequences": ["a" * 300]}, "stop_sequences"),
    ({"mcp_servers": [{"url": "http://a"}]}, "mcp_servers"), ({"temperature": -1}, "temperature"),
    ({"output_config": {"format": {"type": "json_schema", "schema": 1}}}, "response_format.json_schema.schema"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(backend: Backend, fields: dict[str, Any], param: str) -> None:
    error = refusal(backend, **fields)
    assert (error.status, error.param) == (400, param)


def test_another_model_is_not_found(backend: Backend) -> None:
    assert refusal(backend, model="claude-sonnet-4-5").status == 404
