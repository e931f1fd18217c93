"""A chat completion as clients send it, and the job that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from cluster.http.conversation import answer_constraint, make_conversation
from cluster.http.core.backend import Backend
from cluster.http.core.errors import refuse
from cluster.http.files.attachments import Attachment, Attachments, Documents, document_id
from cluster.http.openai.answer_format import read_constraint
from cluster.http.options import (
    AnswerFields,
    RequestModel,
    answer_options,
    check_model,
    check_supported,
    choices_of,
    first_set,
    job_fields,
    num_choices,
)
from cluster.jobs.model import JobInput, JobSpec, check_id
from protos.jobs import validate

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


def chat_specs(backend: Backend, request: ChatRequest, documents: Documents) -> list[JobSpec]:
    """Return a job for each answer that a chat completion asks for. Args and errors: as of `chat_spec`."""
    count = num_choices(request)
    return choices_of(chat_spec(backend, request.model_copy(update={"n": None}), documents), count)


def chat_spec(backend: Backend, request: ChatRequest, documents: Documents) -> JobSpec:
    """Return the job of a chat completion with one answer.

    Raises ApiError, InvalidRequest, and what reading a file raises.

    Args:
        documents: those that the client may see.
    """
    check_model(backend, request.model)
    check_supported(request)
    source = chat_input(request.messages, request, documents)
    max_tokens = first_set((request.max_completion_tokens, request.max_tokens))
    options = answer_options(
        request, max_tokens, _logprobs(request), _thinking(request), backend.limits.http_max_tokens
    )
    asked = read_constraint(request.response_format, request.structured_outputs)
    options = replace(options, structured_outputs=answer_constraint(backend, asked, source))
    return JobSpec(source, options, attached=True, shorten=max_tokens is None, **job_fields(request))


def chat_input(messages: Sequence[RequestMessage], request: ToolFields, documents: Documents) -> JobInput:
    """Return the input of a job.

    A single user message with one stored file, without tools, is a question about that document; any other file
    becomes text of its message.

    Raises ApiError, InvalidRequest, and what reading a file raises.
    """
    files = [part.file or FilePart() for message in messages for part in _parts(message) if part.type == "file"]
    is_alone = len(files) == len(messages) == 1 and messages[0].role == "user" and not request.tools
    if is_alone and files[0].file_id:
        return _question(messages[0], files[0].file_id)
    if files:
        reader = Attachments(documents)
        messages = [_with_texts(reader, f"messages[{index}]", message) for index, message in enumerate(messages)]
    return conversation(messages, request)


def _question(message: RequestMessage, file_id: str) -> JobInput:
    texts = [
        _part_text(f"messages[0].content[{at}]", part) for at, part in enumerate(_parts(message)) if part.type != "file"
    ]
    question = validate.check_text("messages[0].content", "\n".join(texts))
    if not question.strip():
        raise refuse("messages[0].content", "must have a part of type text beside the file")
    return JobInput(check_id(document_id(file_id), "doc"), (question,))


def _with_texts(reader: Attachments, where: str, message: RequestMessage) -> RequestMessage:
    """Return a message with the texts of its files in place of the files."""
    parts = [
        ContentPart(type="text", text=reader.text(_attachment(f"{where}.content[{at}].file", part.file)))
        if part.type == "file"
        else part
        for at, part in enumerate(_parts(message))
    ]
    return message.model_copy(update={"content": parts}) if parts else message


def _attachment(where: str, file: FilePart | None) -> Attachment:
    file = file or FilePart()
    return Attachment(where, file.filename or "", file.file_id or "", file.file_data or "")


def _parts(message: RequestMessage) -> list[ContentPart]:
    return message.content if isinstance(message.content, list) else []


def conversation(messages: Sequence[RequestMessage], request: ToolFields) -> JobInput:
    """Return messages and tools as input of a job; content is empty where there is none. Raises InvalidRequest."""
    values = [{"content": "", **message.model_dump(exclude_none=True)} for message in messages]
    parallel = False if request.parallel_tool_calls is False else None
    return make_conversation(values, request.tools, request.tool_choice, parallel)


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
