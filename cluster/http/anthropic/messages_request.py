"""Anthropic's messages as clients send them, and the job that answers them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from cluster.http.anthropic.cache_control import read_cache_ttl
from cluster.http.conversation import answer_constraint, make_conversation
from cluster.http.core.backend import Backend
from cluster.http.core.errors import refuse
from cluster.http.files.attachments import Attachment, Attachments, Documents
from cluster.http.openai.answer_format import read_constraint
from cluster.http.options import (
    AnswerFields,
    RequestModel,
    answer_options,
    check_model,
    check_supported,
    job_fields,
)
from cluster.jobs.model import JobInput, JobSpec
from protos.jobs.chat_values import dump
from protos.jobs.limits import MAX_UINT32
from protos.jobs.validate import check_integer, show

# fields of this protocol by the names that messages of the job service begin with
MESSAGES_PARAMS = {
    "prompt": "messages", "conversation": "messages", "stop": "stop_sequences", "structured_outputs": "output_config",
}  # fmt: skip
# a line that Claude Code puts first and changes with every request: no prefix would ever be found computed
_BILLING = re.compile(r"\A(?:\s*x-anthropic-billing-header:[^\n]*(?:\n|\Z))+", re.IGNORECASE)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}


class Source(RequestModel):
    """Where the content of a document is."""

    type: str
    data: str | None = None
    content: str | list[Block] | None = None
    file_id: str | None = None


class Block(RequestModel):
    """A block of content."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    source: Source | None = None
    title: str | None = None
    context: str | None = None
    cache_control: Any = None


class Message(RequestModel):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CountTokensRequest(RequestModel):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = Field(None, description="The name of the served model, or nothing.")
    messages: Annotated[list[Message], FailFast()]
    system: str | list[Block] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = Field(None, description='{"type": "enabled"}: with reasoning. Default: without.')
    mcp_servers: list[Any] | None = None


class MessagesRequest(AnswerFields, CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    output_config: dict[str, Any] | None = Field(None, description="`format`: a JSON schema that the answer matches.")
    cache_control: Any = Field(
        None,
        description='{"type": "ephemeral", "ttl": "5m" or "1h"}, here or in a block: what is computed stays stored.',
    )


def messages_spec(backend: Backend, request: MessagesRequest, documents: Documents) -> JobSpec:
    """Return the job of a request. Raises ApiError, InvalidRequest, and what reading a file raises.

    Args:
        documents: those that the client may see.
    """
    check_model(backend, request.model)
    check_supported(request)
    source = messages_input(request, documents)
    said = {"stop": request.stop_sequences, "thinking_token_budget": _budget(request)}
    options = answer_options(request.model_copy(update=said), request.max_tokens, None, thinks(request), 0)
    asked = read_constraint(_format(request.output_config), None)
    options = replace(options, structured_outputs=answer_constraint(backend, asked, source))
    ttl_s = read_cache_ttl(_cache_marks(request))
    return JobSpec(source, options, attached=True, shorten=True, cache_ttl_s=ttl_s, **job_fields(request))


def messages_input(request: CountTokensRequest, documents: Documents) -> JobInput:
    """Return messages and tools as input of a job. Args and errors: as of `messages_spec`."""
    if request.mcp_servers:
        raise refuse("mcp_servers", "are not supported: leave them out", "unsupported_value")
    if request.messages and request.messages[-1].role == "assistant":
        problem = "the last message is an assistant's: must be a user's"
        raise refuse(f"messages[{len(request.messages) - 1}].role", problem, "unsupported_value")
    reader = _Reader(Attachments(documents))
    values = [value for at, one in enumerate(request.messages) for value in reader.messages(f"messages[{at}]", one)]
    system = _BILLING.sub("", reader.text("system", request.system or "", billing=True))
    if system:
        values.insert(0, {"role": "system", "content": system})
    choice, parallel = _tool_choice(request.tool_choice)
    tools = [_tool(f"tools[{at}]", tool) for at, tool in enumerate(request.tools or ())]
    return make_conversation(values, tools, choice if tools else None, parallel)


def thinks(request: CountTokensRequest) -> bool:
    """Return whether an answer begins with reasoning. Raises ApiError."""
    kind = (request.thinking or {}).get("type", "disabled")
    if not isinstance(kind, str) or kind not in _THINKING:
        raise refuse("thinking.type", f"{show(kind)}: must be one of {', '.join(_THINKING)}")
    return _THINKING[kind]


def _cache_marks(request: MessagesRequest) -> Iterator[tuple[str, object]]:
    """Yield every place of a request that may have a mark, with what it has."""
    yield "cache_control", request.cache_control
    for at, tool in enumerate(request.tools or ()):
        yield f"tools[{at}].cache_control", tool.get("cache_control") if isinstance(tool, Mapping) else None
    yield from _marks_of("system", request.system)
    for at, message in enumerate(request.messages):
        yield from _marks_of(f"messages[{at}].content", message.content)


def _marks_of(where: str, content: str | Sequence[Block] | None) -> Iterator[tuple[str, object]]:
    for at, block in enumerate(() if content is None or isinstance(content, str) else content):
        yield f"{where}[{at}].cache_control", block.cache_control
        yield from _marks_of(f"{where}[{at}].content", block.content)
        yield from _marks_of(f"{where}[{at}].source.content", block.source.content if block.source else None)


def _budget(request: MessagesRequest) -> int | None:
    """Return how many tokens of reasoning there may be; None: any number. Raises InvalidRequest."""
    budget = (request.thinking or {}).get("budget_tokens")
    if budget is None:
        return request.thinking_token_budget
    return check_integer("thinking.budget_tokens", budget, 0, MAX_UINT32)


class _Reader:
    """Turns blocks into messages of OpenAI's chat completions."""

    def __init__(self, files: Attachments) -> None:
        self._files = files

    def messages(self, where: str, message: Message) -> Iterator[dict[str, Any]]:
        """Yield one message: an assistant's as it is, a user's with a message of its own for every tool result."""
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield self._assistant(f"{where}.content", message.content)
        else:
            yield from self._user(f"{where}.content", message.role, message.content)

    def _user(self, where: str, role: str, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
        texts: list[str] = []
        for at, block in enumerate(blocks):
            if block.type != "tool_result":
                texts.append(self._block(f"{where}[{at}]", block))
                continue
            if texts:
                yield {"role": role, "content": "\n".join(texts)}
                texts = []
            content = self.text(f"{where}[{at}].content", block.content or "")
            yield {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content}
        if texts or not blocks:
            yield {"role": role, "content": "\n".join(texts)}

    def _assistant(self, where: str, blocks: Sequence[Block]) -> dict[str, Any]:
        texts, thoughts, calls = [], [], []
        for at, block in enumerate(blocks):
            if block.type == "thinking":
                thoughts.append(block.thinking or "")
            elif block.type == "tool_use":
                arguments = dump(f"{where}[{at}].input", {} if block.input is None else block.input)
                calls.append({"id": block.id or "", "function": {"name": block.name, "arguments": arguments}})
            elif block.type != "redacted_thinking":  # nobody can read that
                texts.append(self._block(f"{where}[{at}]", block))
        message = {"role": "assistant", "content": "\n".join(texts), "reasoning": "\n".join(thoughts)}
        return message | ({"tool_calls": calls} if calls else {})

    def text(self, where: str, content: str | Sequence[Block], billing: bool = False) -> str:
        """Return the text of blocks, joined by line breaks.

        Args:
            billing: leave out the line of Claude Code at the beginning of a block.
        """
        if isinstance(content, str):
            return content
        texts = [self._block(f"{where}[{at}]", block) for at, block in enumerate(content)]
        return "\n".join(filter(None, (_BILLING.sub("", text) for text in texts)) if billing else texts)

    def _block(self, where: str, block: Block) -> str:
        if block.type == "text":
            return block.text or ""
        if block.type == "document":
            return self._document(where, block, block.source or Source(type=""))
        raise refuse(f"{where}.type", f"{show(block.type)}: is not supported here", "unsupported_value")

    def _document(self, where: str, block: Block, source: Source) -> str:
        at, title = f"{where}.source", block.title or ""
        match source.type:
            case "text":
                found = Attachment(at, title, text=source.data or "")
            case "base64":
                found = Attachment(at, title, data=source.data or "")
            case "file":
                found = Attachment(at, title, id=source.file_id or "")
            case "content":
                found = Attachment(at, title, text=self.text(f"{at}.content", source.content or ""))
            case _:
                problem = f"{show(source.type)}: must be text, base64, file or content"
                raise refuse(f"{at}.type", problem, "unsupported_value")
        text = self._files.text(found)
        return f"{text}{block.context}\n" if block.context else text


def _tool(where: str, tool: object) -> Mapping[str, Any]:
    """Return a tool in the form of OpenAI's."""
    if not isinstance(tool, Mapping):
        raise refuse(where, f"{show(tool)}: must be an object with name and input_schema")
    if tool.get("type") not in (None, "custom"):
        problem = f"{show(tool['type'])}: tools that a server runs are not supported: leave it out"
        raise refuse(f"{where}.type", problem, "unsupported_value")
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    return {"type": "function", "function": {ours: tool[name] for name, ours in names.items() if name in tool}}


def _tool_choice(choice: Mapping[str, Any] | None) -> tuple[object, bool | None]:
    """Return a choice in the form of OpenAI's, and False for at most one call."""
    if choice is None:
        return None, None
    parallel = False if choice.get("disable_parallel_tool_use") is True else None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, parallel
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise refuse("tool_choice.type", f"{show(kind)}: must be one of {', '.join(_CHOICES)}, tool")
    return _CHOICES[kind], parallel


def _format(config: Mapping[str, Any] | None) -> object:
    """Return the format of an answer as chat completions say it."""
    said = (config or {}).get("format")
    if isinstance(said, Mapping) and said.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": said.get("schema")}}
    return said
