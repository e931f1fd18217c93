"""A chat completion as clients send it, and the job that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from cluster.http.core.backend import Backend
from cluster.http.core.errors import refuse
from cluster.http.openai.answer_format import read_constraint
from cluster.http.options import (
    AnswerFields,
    RequestModel,
    answer_options,
    check_model,
    check_supported,
    first_set,
    job_fields,
)
from cluster.jobs.model import JobInput, JobSpec, check_id
from cluster.text.tools.formats import ToolFormat
from protos.jobs import validate
from protos.jobs.chat import AUTO, check_chat
from protos.jobs.chat_values import read_messages, read_tool_choice, read_tools
from protos.jobs.constraint import Constraint
from protos.jobs.limits import MAX_MESSAGES

# fields of this protocol by the names that messages of the job service begin with
CHAT_PARAMS = {"prompt": "messages", "conversation": "messages", "logprobs": "top_logprobs"}
_MAX_TOP_LOGPROBS = 20


class FilePart(RequestModel):
    """A file in a message."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class ContentPart(RequestModel):
    """A part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None
    file: FilePart | None = None


class RequestMessage(RequestModel):
    """A message; an earlier answer may come with its reasoning under either name."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(RequestModel):
    """What a stream says beside the answer."""

    include_usage: bool | None = None


class ToolFields(RequestModel):
    """What requests may say about tools."""

    tools: list[Any] | None = None
    tool_choice: Any = Field(None, description="none, auto, required, or a function with its name.")
    parallel_tool_calls: Any = Field(None, description="false: at most one call.")


class ChatRequest(AnswerFields, ToolFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[RequestMessage], FailFast()]
    max_completion_tokens: int | None = Field(None, description="Default: all that fits, up to server.http_max_tokens.")
    max_tokens: int | None = Field(None, description="The old name of max_completion_tokens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, description='"none" switches thinking off.')
    return_progress: bool | Literal["reasoning"] | None = Field(
        None, description='Stream how far the prompt is read: as `prompt_progress`, or with "reasoning" as that text.'
    )
    response_format: Any = None
    structured_outputs: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    chat_template: str | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    prompt_logprobs: int | None = None


def chat_spec(backend: Backend, request: ChatRequest) -> JobSpec:
    """Return the job of a chat completion. Raises ApiError, InvalidRequest."""
    check_model(backend, request.model)
    check_supported(request)
    source = document_input(request.messages)
    if source is not None and request.tools:
        raise refuse("tools", "are beside a part of type file: leave one of them out", "unsupported_value")
    source = source or conversation(request.messages, request)
    max_tokens = first_set((request.max_completion_tokens, request.max_tokens))
    options = answer_options(
        request, max_tokens, _logprobs(request), _thinking(request), backend.limits.http_max_tokens
    )
    options = replace(options, structured_outputs=_constraint(backend, request, source))
    return JobSpec(source, options, attached=True, shorten=max_tokens is None, **job_fields(request))


def document_input(messages: Sequence[RequestMessage]) -> JobInput | None:
    """Return a question about a stored document: a single user message with a file part. None without such a part.

    Raises ApiError: more than one file, or other messages beside it.
    """
    found = [
        (f"messages[{index}].content[{at}]", part)
        for index, message in enumerate(messages)
        for at, part in enumerate(message.content if isinstance(message.content, list) else ())
        if part.type == "file"
    ]
    if not found:
        return None
    where, part = found[0]
    if part.file is None or not part.file.file_id:
        raise refuse(f"{where}.file.file_id", "(missing): must be the id of a stored document", "unsupported_value")
    if len(found) > 1:
        raise refuse(f"{found[1][0]}.type", "a second file: a request is about one", "unsupported_value")
    if len(messages) > 1 or messages[0].role != "user":
        problem = "with a file part must be a single user message"
        raise refuse("messages", f"{len(messages)}: {problem}", "unsupported_value")
    parts = [part for part in messages[0].content or () if isinstance(part, ContentPart)]
    texts = [_part_text(f"messages[0].content[{at}]", part) for at, part in enumerate(parts) if part.type != "file"]
    question = validate.check_text("messages[0].content", "\n".join(texts))
    if not question.strip():
        raise refuse("messages[0].content", "must have a part of type text beside the file")
    return JobInput(check_id(document_id(part.file.file_id), "doc"), (question,))


def document_id(file_id: str) -> str:
    """Return the id of the document that a file is: `file-` and `doc_` are followed by the same digits."""
    return f"doc_{file_id.removeprefix('file-')}" if file_id.startswith("file-") else file_id


def conversation(messages: Sequence[RequestMessage], request: ToolFields) -> JobInput:
    """Return messages and tools as input of a job; content is empty where there is none. Raises InvalidRequest."""
    validate.check_count("messages", len(messages), MAX_MESSAGES)
    found = read_messages([{"content": "", **message.model_dump(exclude_none=True)} for message in messages])
    tools = read_tools(request.tools)
    choice = read_tool_choice(request.tool_choice, False if request.parallel_tool_calls is False else None)
    check_chat(found, tools, choice)
    return JobInput(messages=found, tools=tools, tool_choice=choice if tools else AUTO)


def _constraint(backend: Backend, request: ChatRequest, source: JobInput) -> Constraint | None:
    """Return what the answer must match, be it for its format or for its tools. Raises ApiError, InvalidRequest."""
    asked = read_constraint(request.response_format, request.structured_outputs)
    runtime = backend.runtime
    if not source.tools or source.tool_choice.mode == "none" or runtime.tool_format is ToolFormat.NONE:
        return asked
    schema = asked.schema() if asked is not None and asked.kind in ("json_schema", "json_object") else None
    if asked is not None and not isinstance(schema, dict):
        problem = 'must be a JSON schema beside tools that may be called: leave one out, or say tool_choice "none"'
        raise refuse("structured_outputs", problem)
    grammar = runtime.call_grammar(source.tools, source.tool_choice, schema if isinstance(schema, dict) else None)
    return Constraint("grammar", grammar) if grammar is not None else None


def chat_params(request: ChatRequest) -> Mapping[str, str]:
    """Return the fields of a request by the names that messages of the job service begin with."""
    if request.structured_outputs:
        return CHAT_PARAMS
    has_format = request.response_format not in (None, "text", {"type": "text"})
    return {**CHAT_PARAMS, "structured_outputs": "response_format" if has_format else "tools"}


def _part_text(where: str, part: ContentPart) -> str:
    if part.type in ("text", "input_text", "output_text", "refusal"):
        return part.text or ""
    raise refuse(f"{where}.type", f"{validate.show(part.type)}: must be text or file", "unsupported_value")


def _logprobs(request: ChatRequest) -> int | None:
    """Return how many likeliest tokens to report, None for no log-probabilities at all."""
    top = request.top_logprobs or 0
    validate.check_integer("top_logprobs", top, 0, _MAX_TOP_LOGPROBS)
    if top and not request.logprobs:
        raise refuse("top_logprobs", f"{top}: needs logprobs: true")
    return top if request.logprobs else None


def _thinking(request: ChatRequest) -> bool | None:
    """Return whether to think, None to leave it to the chat template."""
    said = (request.chat_template_kwargs or {}).get("enable_thinking")
    if said is not None and not isinstance(said, bool):
        raise refuse("chat_template_kwargs.enable_thinking", f"{validate.show(said)}: must be true or false")
    off = False if request.reasoning_effort == "none" else None
    chosen: bool | None = first_set((said, request.enable_thinking, off))
    return chosen
