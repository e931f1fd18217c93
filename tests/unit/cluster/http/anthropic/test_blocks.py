"""Blocks of an answer: what a stream adds up to is the whole, however it is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.http.answers import AnswerScanner
from cluster.http.anthropic.blocks import BlockWriter, parse_input
from cluster.text.tools.formats import ToolFormat
from protos.jobs.chat import AUTO, Tool

TOOLS = (Tool("f", "", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})), Tool("now"))
TEXT = (
    'Look:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "now"}\n</tool_call>'
)


def events(raw: bytes) -> list[dict[str, Any]]:
    """Events, each with its name in both places."""
    found = []
    for piece in raw.decode().split("\n\n")[:-1]:
        name, data = piece.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def joined(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that a client makes of the events of a stream, in which each block ends before the next."""
    blocks: list[dict[str, Any]] = []
    is_open, arguments = False, ""
    for one in found:
        if one["type"] == "content_block_start":
            assert not is_open
            is_open, arguments = True, ""
            blocks.append(one["content_block"])
        elif one["type"] == "content_block_delta":
            assert is_open
            delta = one["delta"]
            kind = delta["type"].removesuffix("_delta")
            if kind == "input_json":
                arguments += delta["partial_json"]
            else:
                blocks[-1][kind] += delta[kind]
        else:
            is_open = False
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = json.loads(arguments)
        assert one["index"] == len(blocks) - 1
    assert not is_open
    return blocks


@pytest.mark.parametrize("size", [1, 2, 17, 67, 193])
def test_a_stream_adds_up_to_the_whole(size: int) -> None:
    writer, scanner = BlockWriter("5"), AnswerScanner(ToolFormat.QWEN3_JSON, TOOLS, AUTO)
    raw = writer.think("") + writer.think("Let me ") + writer.think("see")
    for at in range(0, len(TEXT), size):
        raw += writer.take(scanner.push(TEXT[at : at + size]))
    raw += writer.take(scanner.flush()) + writer.end() + writer.end()
    assert writer.blocks == [
        {"type": "thinking", "thinking": "Let me see", "signature": ""},
        {"type": "text", "text": "Look:"},
        {"type": "tool_use", "id": "toolu_5_0", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_5_1", "name": "now", "input": {}},
    ]
    assert joined(events(raw)) == writer.blocks


def test_an_answer_without_text_has_no_blocks() -> None:
    writer = BlockWriter("5")
    assert writer.end() == b""
    assert writer.blocks == []


@pytest.mark.parametrize(("text", "value"), [("", {}), ('{"a": 1}', {"a": 1}), ('{"a": ', {}), ("[1]", {})])
def test_arguments_as_an_object(text: str, value: dict[str, Any]) -> None:
    assert parse_input(text) == value
