"""Messages and tools as chat templates expect them: those that transformers documents, and Qwen's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from protos.jobs.chat import ChatMessage, Tool, ToolCall


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages for a chat template.

    Arguments of calls become objects, which templates go through; what is no JSON object stays text. Reasoning of
    earlier answers has both names that templates look for.
    """
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        values |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
    if message.tool_calls:
        values["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        values["tool_call_id"] = message.tool_call_id
    if message.name:
        values["name"] = message.name
    return values


def _call(call: ToolCall) -> dict[str, Any]:
    values: dict[str, Any] = {"id": call.id} if call.id else {}
    return values | {"type": "function", "function": {"name": call.name, "arguments": call_arguments(call.arguments)}}


def call_arguments(text: str) -> dict[str, Any] | str:
    """Return the object that the arguments of a call are; the text itself if they are none."""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):  # a call that broke off
        return text
    return found if isinstance(found, dict) else text


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Return tools for a chat template, with what describes them alone; None without any."""
    return [_tool(tool) for tool in tools] or None


def _tool(tool: Tool) -> dict[str, Any]:
    values: dict[str, Any] = {"name": tool.name}
    if tool.description:
        values["description"] = tool.description
    if tool.parameters:
        values["parameters"] = json.loads(tool.parameters)
    return {"type": "function", "function": values}


def chat_texts(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[str]:
    """Return all texts that the prompt of a conversation may show, for bounds on its length."""
    texts = [text for message in messages for text in (message.content, message.reasoning)]
    texts += [text for message in messages for call in message.tool_calls for text in (call.name, call.arguments)]
    return texts + [text for tool in tools for text in (tool.name, tool.description, tool.parameters)]
