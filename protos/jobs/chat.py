"""The messages of a chat and the tools that a model may call, as jobs carry them."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")
CHOICES = ("auto", "none", "required", "named")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant made; `arguments` is the JSON text of an object, or what the model wrote for one."""

    id: str
    name: str
    arguments: str = "{}"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; `reasoning` and `tool_calls` are an assistant's, `tool_call_id` says what a tool's result answers.

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
    """Whether the model may ("auto"), must not ("none") or must ("required") call a tool, or the one of this `name`."""

    mode: str = "auto"
    name: str = ""
    parallel: bool = True  # several calls in one answer
