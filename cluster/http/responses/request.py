"""A response as clients ask for it, and the job that makes it: the chat completion that says the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluster.http.core.backend import Backend
from cluster.http.core.errors import ApiError, refuse, to_api_error
from cluster.http.openai.chat_request import ChatRequest, ToolFields, chat_spec
from cluster.http.options import AnswerFields, RequestModel
from cluster.http.responses.input_items import to_messages, with_instructions
from cluster.http.responses.names import call_id, flat_tools, full_name, response_id
from cluster.http.responses.response import API, said_of, stored_response
from cluster.jobs.model import JobRecord, JobSpec, JobState
from cluster.text.tools.formats import scan_answer
from protos.jobs.chat import ChatMessage, ToolCall, check_chat
from protos.jobs.chat_values import dump
from protos.jobs.limits import MAX_CHARS
from protos.jobs.validate import check_count, check_text, show

if TYPE_CHECKING:
    from cluster.jobs.tenants.service import TenantService

_MAX_METADATA = 16
# what a field of a chat completion is called here; the first that fits counts
_FIELDS = (
    (
        re.compile(r"(messages|prompt|conversation)(?![a-z_])(\[\d+\])?(\.content(\[\d+\])?)?(\.file)?(\.type)?"),
        "input",
    ),
    (re.compile(r"response_format\.json_schema"), "text.format"),
    (re.compile(r"response_format"), "text.format"),
    (re.compile(r"max_completion_tokens|max_tokens"), "max_output_tokens"),
    (re.compile(r"reasoning_effort"), "reasoning.effort"),
)
_TOOL = re.compile(r"tools\[(\d+)\]")


class Reasoning(RequestModel):
    """How to think."""

    effort: str | None = Field(default=None, description='"none" switches thinking off.')
    summary: str | None = None


class TextOptions(RequestModel):
    """What the text must be like."""

    format: Any = Field(default=None, description="text, json_object, or json_schema with its schema.")
    verbosity: str | None = None


class ResponsesRequest(AnswerFields, ToolFields):
    """`POST /v1/responses`."""

    input: str | list[Any] = Field(description="A text, or items: message, reasoning, function_call and its output.")
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, description="Default: all that fits, up to server.http_max_tokens.")
    stream: bool | None = None
    background: bool | None = Field(None, description="Answer at once; the job goes on without its client.")
    store: bool | None = Field(None, description="Default true: can be read again by its id.")
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: Any = None
    top_logprobs: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # known to clients, with values that cannot be honoured here
    conversation: Any = None
    prompt: Any = None

    @property
    def is_stored(self) -> bool:
        """Whether it can be read again."""
        return self.store is not False


def response_spec(
    service: TenantService, backend: Backend, request: ResponsesRequest, idempotency_key: str = ""
) -> JobSpec:
    """Return the job of a response. Raises ApiError, InvalidRequest, with the names of this protocol.

    Args:
        service: has the response that it goes on from.
        idempotency_key: of a response in the background: the same request with it is the same response.
    """
    _check(request)
    chat = _chat_request(request)
    try:
        spec = chat_spec(backend, chat, service.documents)
    except Exception as error:
        raise in_own_words(error, request) from error
    if request.previous_response_id:
        spec = _go_on(service, backend, request, spec)
    key = check_text("Idempotency-Key", idempotency_key, MAX_CHARS) if request.background else ""
    said = dump("request", {"api": API, "response": _said(backend, request)})
    return replace(spec, attached=not request.background, idempotency_key=key, request=said)


def in_own_words(error: Exception, request: ResponsesRequest) -> ApiError:
    """Return an error about the chat completion of a request, or about its job, with the names of this protocol."""
    params = {}
    if not request.structured_outputs:
        params["structured_outputs"] = "text.format" if _has_format(request) else "tools"
    shown = to_api_error(error, params)
    for pattern, name in _FIELDS:
        if match := pattern.match(shown.param or ""):
            shown.param = name + str(shown.param)[match.end() :]
            if at := pattern.match(shown.message):
                shown.message = name + shown.message[at.end() :]
            break
    if match := _TOOL.match(shown.param or ""):  # counted among the functions
        place, _ = flat_tools(request.tools or ())[int(match[1])]
        shown.param = place + str(shown.param)[match.end() :]
        shown.message = place + shown.message[match.end() :]
    return shown


def _has_format(request: ResponsesRequest) -> bool:
    return request.text is not None and request.text.format not in (None, {"type": "text"})


def _check(request: ResponsesRequest) -> None:
    """Refuse what cannot be honoured and no chat completion has."""
    if request.background and not request.is_stored:
        raise refuse("store", "false: must be true with background: it could not be read again", "unsupported_value")
    for name in ("conversation", "prompt"):
        if (value := getattr(request, name)) is not None:
            raise refuse(name, f"{show(value)}: is not supported here: leave it out", "unsupported_value")
    if request.top_logprobs:
        problem = f"{request.top_logprobs}: is not supported here: chat completions have log-probabilities"
        raise refuse("top_logprobs", problem, "unsupported_value")
    check_count("metadata", len(request.metadata or {}), _MAX_METADATA)


def _chat_request(request: ResponsesRequest) -> ChatRequest:
    """Return the chat completion that asks for the same."""
    text, reasoning = request.text or TextOptions(), request.reasoning or Reasoning()
    tools = [tool for _, tool in flat_tools(request.tools or ())]
    messages = with_instructions(to_messages(request.input), request.instructions, bool(tools))
    if not messages:
        raise refuse("input", "empty: must have at least one item")
    same = {*AnswerFields.model_fields, "enable_thinking", "chat_template_kwargs", "structured_outputs"}
    values = request.model_dump(include=same) | {
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "reasoning_effort": reasoning.effort,
        "response_format": _format(text.format),
        "tools": tools or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
    }
    return ChatRequest.model_validate(values)


def _format(value: object) -> object:
    """Return a format as chat completions nest it."""
    if not isinstance(value, Mapping) or value.get("type") != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {key: item for key, item in value.items() if key != "type"}}


def _tool_choice(value: object) -> object:
    if isinstance(value, Mapping) and "namespace" in value:
        return {**value, "name": full_name(value["namespace"], value.get("name"))}
    return value


def _said(backend: Backend, request: ResponsesRequest) -> dict[str, Any]:
    """Return what the response says of its request, whatever becomes of it."""
    text, reasoning = request.text or TextOptions(), request.reasoning or Reasoning()
    return {
        "background": bool(request.background),
        "store": request.is_stored,
        "model": backend.model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "text": {"format": text.format or {"type": "text"}, "verbosity": text.verbosity or "medium"},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": request.tools or [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": request.user,
    }


# --- going on from an earlier response -------------------------------------------------------------------------------


def _go_on(service: TenantService, backend: Backend, request: ResponsesRequest, spec: JobSpec) -> JobSpec:
    """Return the job with the conversation of the earlier response before its own."""
    assert request.previous_response_id is not None
    before = previous_messages(service, backend, request.previous_response_id)
    if spec.input.messages is None:
        raise refuse("previous_response_id", "beside a stored file: leave one of them out", "unsupported_value")
    at = 1 if request.instructions else 0
    messages = (*spec.input.messages[:at], *before, *spec.input.messages[at:])
    check_chat(messages, spec.input.tools, spec.input.tool_choice)
    return replace(spec, input=replace(spec.input, messages=messages))


def previous_messages(service: TenantService, backend: Backend, value: str) -> tuple[ChatMessage, ...]:
    """Return the conversation of a stored response up to its answer, without its instructions. Raises ApiError."""
    try:
        record = stored_response(service, value)
    except ApiError as error:
        raise ApiError(
            error.status, f"previous_{error.message}", param="previous_response_id", code=error.code
        ) from error
    if record.state is not JobState.SUCCEEDED:
        raise refuse("previous_response_id", f"{response_id(record.id)}: must have been completed")
    messages = record.spec.input.messages
    if messages is None:
        problem = f"{response_id(record.id)}: is about a stored file: ask about the file again"
        raise refuse("previous_response_id", problem, "unsupported_value")
    own = messages[1 if said_of(record)["instructions"] else 0 :]
    return (*own, _answer(backend, record))


def _answer(backend: Backend, record: JobRecord) -> ChatMessage:
    source, answer = record.spec.input, record.answers[0]
    found = scan_answer(answer.text, backend.runtime.tool_format, source.tools, source.tool_choice)
    calls = found.calls[:1] if source.tool_choice.one_call else found.calls
    made = tuple(ToolCall(call_id(record.id, at), call.name, call.arguments) for at, call in enumerate(calls))
    return ChatMessage("assistant", found.text, answer.reasoning or "", made)
