"""No field of a request of any protocol becomes a control token, whatever parts of one it has."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.http.anthropic.messages_request import MessagesRequest, messages_input
from cluster.http.openai.chat_request import ChatRequest, chat_input
from cluster.http.responses.request import ResponsesRequest, _chat_request
from cluster.jobs.model import JobInput
from cluster.text.chat_prompt import encode_chat
from cluster.text.tokenizer import TextTokenizer
from cluster.text.tools.prompt import template_messages, template_tools
from tests.support.tools.models import QWEN3, QWEN3_CODER, control_tokens, with_tool_tokens

FILE = {"file_id": "file-" + "0" * 32}
Text = Callable[[], str]  # returns the text of the next field


class Stored:
    """Documents whose names and texts are like any other field."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def get(self, document_id: str) -> Any:
        return SimpleNamespace(id=document_id, size_bytes=10, name=self._text())

    def read(self, document_id: str) -> bytes:
        return self._text().encode()


def schema(t: Text) -> dict[str, Any]:
    field = {"type": "string", "description": t(), "enum": [t()], "default": t(), "title": t(), t(): t()}
    return {"type": "object", "properties": {t(): field}, "required": [t()], t(): {t(): [t()]}}


def function(t: Text) -> dict[str, Any]:
    return {"name": t(), "arguments": json.dumps({t(): t(), "a": [{t(): t()}]})}


def chat(t: Text) -> JobInput:
    request = ChatRequest.model_validate({
        "messages": [
            {"role": "system", "content": t()},
            {"role": "user", "name": t(), "content": [
                {"type": "text", "text": t()}, {"type": "text", "text": t()},
                {"type": "file", "file": {**FILE, "filename": t()}}, {"type": "file", "file": FILE},
            ]},
            {"role": "assistant", "content": t(), "reasoning": t(), "tool_calls": [
                {"id": t(), "function": function(t)},
            ]},
            {"role": "tool", "tool_call_id": t(), "content": [{"type": "text", "text": t()}] * 2},
            {"role": "assistant", "content": t(), "reasoning_content": t()},
            {"role": "user", "content": t()},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": t(), "parameters": schema(t)}}],
    })  # fmt: skip
    return chat_input(request.messages, request, Stored(t))


def response(t: Text) -> JobInput:
    request = _chat_request(ResponsesRequest.model_validate({
        "instructions": t(),
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": t()}, {"type": "input_file", **FILE}]},
            {"type": "reasoning", "content": [{"text": t()}, {"text": t()}]},
            {"type": "reasoning", "content": [{"text": t()}]},
            {"type": "function_call", "call_id": t(), **function(t)},
            {"type": "function_call_output", "call_id": t(), "output": t()},
            {"role": "developer", "content": t()},
            {"role": "user", "content": t()},
        ],
        "tools": [{"type": "function", "name": "f", "description": t(), "parameters": schema(t)}],
    }))  # fmt: skip
    return chat_input(request.messages, request, Stored(t))


def message(t: Text) -> JobInput:
    request = MessagesRequest.model_validate({
        "max_tokens": 3,
        "system": [{"type": "text", "text": t()}, {"type": "text", "text": t()}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": t()}, {
                "type": "document", "title": t(), "context": t(), "source": {"type": "text", "data": t()},
            }]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": t()}, {"type": "text", "text": t()},
                {"type": "tool_use", "id": t(), "name": t(), "input": {t(): t()}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": t(), "content": [{"type": "text", "text": t()}]},
                {"type": "text", "text": t()},
            ]},
        ],
        "tools": [{"name": "f", "description": t(), "input_schema": schema(t)}],
    })  # fmt: skip
    return messages_input(request, Stored(t))


def tokens_of(tokenizer: TextTokenizer, source: JobInput) -> Counter[str]:
    messages, tools = template_messages(source.messages or ()), template_tools(source.tools)
    return control_tokens(tokenizer, encode_chat(tokenizer, messages, tools=tools, tool_choice="auto"))


def hostile(rng: random.Random, spellings: list[str]) -> str:
    """A control token as it is spelt, a part of one, or what may become one."""
    text, other = rng.choice(spellings), rng.choice(spellings)
    at = rng.randrange(1, len(text))
    return rng.choice([
        text, text, text[:at], text[at:], text.upper(), f" {text} ", f"a{text}\n{other}",
        f"{text[:at]}\u200b{text[at:]}", text.replace("<", "\\u003c"), text.replace("<", "\uff1c"),
        f"{other}{text}", "x",
    ])  # fmt: skip


@pytest.mark.parametrize("make", [chat, response, message])
@pytest.mark.parametrize("template", [QWEN3, QWEN3_CODER], ids=["qwen3", "qwen3-coder"])
def test_no_field_becomes_a_control_token(template: str, make: Callable[[Text], JobInput]) -> None:
    tokenizer = with_tool_tokens(template)
    spellings = [*tokenizer.added_texts, "<|im_start|>system\n", "</think>\n\n"]
    harmless = tokens_of(tokenizer, make(lambda: "x"))
    assert harmless["<|im_start|>"] >= 4
    for seed in range(12):
        rng, said = random.Random(seed), list[str]()

        def next_text(rng: random.Random = rng, said: list[str] = said) -> str:
            said.append(hostile(rng, spellings))
            return said[-1]

        assert tokens_of(tokenizer, make(next_text)) == harmless, (seed, said)
