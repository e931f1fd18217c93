"""Tool calls as deltas and as a message, in both forms, however the answer is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.http.openai.tool_calls import CallWriter
from cluster.text.tools.formats import ToolFormat
from protos.jobs.chat import AUTO, Tool, ToolChoice

TOOLS = (Tool("f", "", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})), Tool("now"))
TEXTS = {
    ToolFormat.QWEN3_JSON: 'Look:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now"}\n</tool_call>',
    ToolFormat.QWEN3_XML: "Look:\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
}


def write(form: ToolFormat, text: str, size: int, choice: ToolChoice = AUTO) -> tuple[CallWriter, list[dict[str, Any]]]:
    writer = CallWriter(form, TOOLS, choice, "5")
    deltas = [delta for at in range(0, len(text), size) for delta in writer.push(text[at : at + size])]
    return writer, deltas + writer.flush()


@pytest.mark.parametrize("size", [1, 2, 17, 67, 193])
@pytest.mark.parametrize("form", TEXTS)
def test_deltas_join_to_the_message(form: ToolFormat, size: int) -> None:
    writer, deltas = write(form, TEXTS[form], size)
    message = writer.message()
    assert message["content"] == "Look:" == "".join(delta.get("content", "") for delta in deltas)
    assert [(call["id"], call["function"]["name"]) for call in message["tool_calls"]] == [
        ("call_5_0", "f"), ("call_5_1", "now"),
    ]  # fmt: skip
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"a": 1}, {}]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    for index, call in enumerate(message["tool_calls"]):
        first, *others = [piece for piece in pieces if piece["index"] == index]
        assert first == {"index": index, **call, "function": {**call["function"], "arguments": ""}}
        assert "".join(piece["function"]["arguments"] for piece in others) == call["function"]["arguments"]
    assert (writer.finish_reason("stop"), writer.finish_reason("length")) == ("tool_calls", "length")


@pytest.mark.parametrize("form", TEXTS)
def test_calls_after_the_first_are_dropped_where_one_is_asked_for(form: ToolFormat) -> None:
    writer, deltas = write(form, TEXTS[form], 5, ToolChoice(one_call=True))
    assert len(writer.message()["tool_calls"]) == 1
    assert {piece["index"] for delta in deltas for piece in delta.get("tool_calls", [])} == {0}


@pytest.mark.parametrize(("form", "choice"), [
    (ToolFormat.NONE, AUTO), (ToolFormat.QWEN3_JSON, ToolChoice("none")),
])  # fmt: skip
def test_all_is_content_where_no_call_is_looked_for(form: ToolFormat, choice: ToolChoice) -> None:
    text = TEXTS[ToolFormat.QWEN3_JSON]
    writer, deltas = write(form, text, 7, choice)
    assert writer.message() == {"content": text}
    assert "".join(delta["content"] for delta in deltas) == text
    assert writer.finish_reason("stop") == "stop"
