"""Requests in the shapes of Codex and Claude Code, streamed, as those programs read the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.data.clients import claude_code, codex

_TIMEOUT_S = 120.0
Body = dict[str, Any]


def events_of(url: str, body: Body, headers: dict[str, str] | None = None) -> list[Body]:
    """Return the events of a stream."""
    answer = httpx.post(url, json=body, headers=headers, timeout=_TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("make", [codex.first_request, codex.request_after_calls])
@pytest.mark.parametrize("is_forced", [False, True])
def test_codex(url: str, make: Callable[[], Body], is_forced: bool) -> None:
    """Every event has its type and number, deltas say of which item, and the last one has items and usage."""
    body = make()
    assert len(body) == 12
    if is_forced:  # a call of a tool in a namespace
        body["tool_choice"] = {"type": "function", "namespace": "mcp__docs", "name": "search"}
        body["tools"][-1]["tools"][0]["parameters"]["properties"]["query"]["enum"] = ["files"]
    else:
        body["max_output_tokens"] = 8
    events = events_of(f"{url}/v1/responses", body)
    assert [event["sequence_number"] for event in events] == sorted(event["sequence_number"] for event in events)
    assert all({"item_id", "output_index"} <= event.keys() for event in events if "delta" in event)
    assert events[0]["type"] == "response.created"
    last = events[-1]["response"]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert last["output"] == [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert last["usage"]["output_tokens"] > 0
    if is_forced:
        (call,) = last["output"]
        assert (call["namespace"], call["name"], json.loads(call["arguments"])) == (
            "mcp__docs", "search", {"query": "files"},
        )  # fmt: skip


@pytest.mark.parametrize("make", [claude_code.first_turn, claude_code.second_turn])
@pytest.mark.parametrize("is_forced", [False, True])
def test_claude_code(url: str, make: Callable[..., Body], is_forced: bool) -> None:
    body = make(max_tokens=200 if is_forced else 8)
    counted = {name: body[name] for name in ("model", "messages", "system", "tools", "thinking")}
    if is_forced:
        properties = {"file_path": {"enum": ["/a.txt"]}}
        body["tools"] = [{**body["tools"][0], "input_schema": {"properties": properties, "required": ["file_path"]}}]
        body["tool_choice"] = {"type": "tool", "name": "Read"}
    events = events_of(f"{url}/v1/messages?beta=true", body, claude_code.HEADERS)
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    if is_forced:
        fragments = [event["delta"].get("partial_json", "") for event in events if "delta" in event]
        assert json.loads("".join(fragments)) == {"file_path": "/a.txt"}
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        return
    usage = events[-2]["usage"]
    tokens = httpx.post(f"{url}/v1/messages/count_tokens?beta=true", json=counted, headers=claude_code.HEADERS)
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert tokens.json()["input_tokens"] == sum(usage[part] for part in parts)
