"""Messages and tools as callers hand them over, in the form of OpenAI's chat completions, as values of `chat`.

Only form and types are checked here, the rest by `chat.check_chat`. Errors (InvalidRequest) name the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from protos.errors import InvalidRequest
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice
from protos.jobs.validate import check_flag, check_text, show

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # fields
_FIELDS = frozenset({
    "role", "content", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "name", "refusal",
})  # fmt: skip


def read_messages(values: object, *, ignore_unknown: bool = False) -> tuple[ChatMessage, ...]:
    """Return chat messages given as mappings or as (role, content).

    Args:
        ignore_unknown: drop fields that no message has, instead of refusing them.
    """
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or not values:
        raise InvalidRequest(f"messages: {show(values)}: must be a list of at least one message")
    return tuple(_message(f"messages[{index}]", value, ignore_unknown) for index, value in enumerate(values))


def _message(key: str, value: object, ignore_unknown: bool) -> ChatMessage:
    if isinstance(value, tuple) and len(value) == 2:
        value = {"role": value[0], "content": value[1]}
    if not isinstance(value, Mapping) or "role" not in value:
        raise InvalidRequest(f"{key}: {show(value)}: must have role and content")
    if not ignore_unknown and (unknown := value.keys() - _FIELDS):
        raise InvalidRequest(f"{key}.{min(map(str, unknown))}: must be one of {', '.join(sorted(_FIELDS))}")
    role = check_text(f"{key}.role", value["role"])
    role = "system" if role == "developer" else role
    if value.get("content") is None and role != "assistant":
        raise InvalidRequest(f"{key}: {show(value)}: must have role and content")
    reasoning = value.get("reasoning")
    reasoning = value.get("reasoning_content") if reasoning is None else reasoning
    return ChatMessage(
        role,
        _content(f"{key}.content", value.get("content")),
        check_text(f"{key}.reasoning", reasoning or "") if role == "assistant" else "",
        _calls(f"{key}.tool_calls", value.get("tool_calls") or ()),
        _optional(f"{key}.tool_call_id", value.get("tool_call_id")),
        _optional(f"{key}.name", value.get("name")),
    )


def _content(key: str, value: object) -> str:
    """Return a text, or the texts of parts, joined by line breaks."""
    if value is None:
        return ""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return check_text(key, value)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise InvalidRequest(f"{key}[{index}].type: {show(kind)}: must be text")
        texts.append(check_text(f"{key}[{index}].{_TEXT_PARTS[kind]}", part.get(_TEXT_PARTS[kind])))
    return "\n".join(texts)


def _calls(key: str, values: object) -> tuple[ToolCall, ...]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise InvalidRequest(f"{key}: {show(values)}: must be a list of tool calls")
    calls = []
    for index, value in enumerate(values):
        at = f"{key}[{index}]"
        function = value.get("function") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(function, Mapping):
            raise InvalidRequest(f"{at}.function: {show(function)}: must have name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = dump(f"{at}.function.arguments", arguments)
        name = check_text(f"{at}.function.name", function.get("name"))
        text = check_text(f"{at}.function.arguments", "" if arguments is None else arguments)
        calls.append(ToolCall(_optional(f"{at}.id", value.get("id")), name, text))
    return tuple(calls)


def read_tools(values: object) -> tuple[Tool, ...]:
    """Return tools given as `{"type": "function", "function": {...}}`, or flat, without `function`; None: no tools."""
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise InvalidRequest(f"tools: {show(values)}: must be a list of functions")
    return tuple(_tool(f"tools[{index}]", value) for index, value in enumerate(values))


def _tool(key: str, value: object) -> Tool:
    kind = value.get("type", "function") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or kind != "function":
        raise InvalidRequest(f"{key}.type: {show(kind)}: must be function")
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{key}.function: {show(function)}: must have a name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequest(f"{key}.parameters: {show(parameters)}: must be a JSON schema, an object")
    strict = function.get("strict")
    return Tool(
        check_text(f"{key}.name", function.get("name")),
        _optional(f"{key}.description", function.get("description")),
        "" if parameters is None else dump(f"{key}.parameters", parameters),
        check_flag(f"{key}.strict", False if strict is None else strict),
    )


def read_tool_choice(value: object, parallel: object = None) -> ToolChoice:
    """Return a choice given as a word or as `{"type": "function", "function": {"name": ...}}`, or flat.

    Args:
        parallel: False for at most one call an answer (`parallel_tool_calls`).
    """
    one_call = parallel is not None and not check_flag("parallel_tool_calls", parallel)
    if value is None:
        return ToolChoice(one_call=one_call)
    if isinstance(value, Mapping):
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, Mapping) else None
        if value.get("type") != "function" or name is None:
            raise InvalidRequest(f"tool_choice: {show(value)}: must have the type function and a name")
        return ToolChoice("named", check_text("tool_choice.name", name), one_call)
    word = check_text("tool_choice", value)
    if word == "named":
        raise InvalidRequest("tool_choice: 'named': must be auto, none, required or a function with its name")
    return ToolChoice(word, "", one_call)


def dump(key: str, value: object) -> str:
    """Return the JSON text of a value; InvalidRequest for what JSON does not have."""
    try:
        return check_text(key, json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{key}: {show(value)}: must be JSON: {error}") from error


def _optional(key: str, value: Any) -> str:
    return "" if value is None else check_text(key, value)
