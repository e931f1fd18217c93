"""The messages of a chat and the tools that a model may call, as jobs carry them, and their one validation.

Errors (InvalidRequest) name key, value and what is allowed. `chat_values` reads them from what callers hand over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protos.errors import InvalidRequest
from protos.jobs.limits import MAX_CHARS, MAX_MESSAGES, MAX_SCHEMA_CHARS, MAX_TOOL_CALLS, MAX_TOOLS
from protos.jobs.validate import check_count, check_text, show

ROLES = ("system", "user", "assistant", "tool")
CHOICES = ("auto", "none", "required", "named")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant made; `arguments` is the JSON text of an object, or what the model wrote for one."""

    id: str
    name: str
    arguments: str = "{}"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; `reasoning` and `tool_calls` are an assistant's, `tool_call_id` says which call a result answers.

    `name` is the tool's, where it is known.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    `parameters` is the JSON text of a schema, empty for none; `strict`: arguments must follow it.
    """

    name: str
    description: str = ""
    parameters: str = ""
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may ("auto"), must not ("none") or must ("required") call a tool, or one ("named") of a name.

    `one_call`: at most one call in an answer.
    """

    mode: str = "auto"
    name: str = ""
    one_call: bool = False


AUTO = ToolChoice()


def check_chat(messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), choice: ToolChoice = AUTO) -> None:
    """Refuse a conversation that does not keep the limits (raises InvalidRequest)."""
    check_count("messages", len(messages), MAX_MESSAGES)
    if not messages:
        raise InvalidRequest("messages: empty: must have at least one")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    check_count("tools", len(tools), MAX_TOOLS)
    names: set[str] = set()
    for index, tool in enumerate(tools):
        _check_tool(f"tools[{index}]", tool)
        if tool.name in names:
            raise InvalidRequest(f"tools[{index}].name: {tool.name}: is another tool's: must be unique")
        names.add(tool.name)
    if choice.mode not in CHOICES:
        raise InvalidRequest(f"tool_choice: {show(choice.mode)}: must be one of {', '.join(CHOICES)}")
    if choice.mode == "named" and choice.name not in names:
        raise InvalidRequest(f"tool_choice: {show(choice.name)}: must be the name of one of the tools")
    if choice.mode == "required" and not tools:
        raise InvalidRequest("tool_choice: required: must have tools")


def _check_message(key: str, message: ChatMessage) -> None:
    if message.role not in ROLES:
        raise InvalidRequest(f"{key}.role: {show(message.role)}: must be one of {', '.join(ROLES)}")
    if message.role != "assistant" and (message.tool_calls or message.reasoning):
        name = "tool_calls" if message.tool_calls else "reasoning"
        raise InvalidRequest(f"{key}.{name}: of a message of {message.role}: must be an assistant's")
    check_text(f"{key}.tool_call_id", message.tool_call_id, MAX_CHARS)
    check_text(f"{key}.name", message.name, MAX_CHARS)
    check_count(f"{key}.tool_calls", len(message.tool_calls), MAX_TOOL_CALLS)
    for index, call in enumerate(message.tool_calls):
        check_text(f"{key}.tool_calls[{index}].id", call.id, MAX_CHARS)
        check_text(f"{key}.tool_calls[{index}].name", call.name, MAX_CHARS, min_chars=1)


def _check_tool(key: str, tool: Tool) -> None:
    if not _TOOL_NAME.fullmatch(tool.name):
        allowed = "must be 1 to 128 letters, digits, underscores, dots and dashes"
        raise InvalidRequest(f"{key}.name: {show(tool.name)}: {allowed}")
    check_text(f"{key}.parameters", tool.parameters, MAX_SCHEMA_CHARS)
    if tool.parameters:
        try:
            schema = json.loads(tool.parameters)
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, Mapping):
            raise InvalidRequest(f"{key}.parameters: {show(tool.parameters)}: must be a JSON schema, an object")
