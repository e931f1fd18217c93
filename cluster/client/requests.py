"""The requests of the clients, built from what callers hand over. Bad values are refused before they are sent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from cluster.client.documents.pieces import PIECE_BYTES
from cluster.client.ingest.source import DocumentText
from cluster.client.models import Document
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.chat import check_chat
from protos.jobs.chat_values import read_messages, read_tool_choice, read_tools
from protos.jobs.constraint import Constraint
from protos.jobs.limits import (
    MAX_CHARS,
    MAX_DEADLINE_S,
    MAX_INT32,
    MAX_INT64,
    MAX_QUESTIONS,
    MAX_REQUEST_BYTES,
)
from protos.jobs.sampling import OPTIONS

PAGE_SIZE = 100  # jobs a call when listing


class SubmitOptions(TypedDict, total=False):
    """Keyword arguments of `submit` besides document and question. What is left out or None, the head decides.

    Attributes:
        token_ids: a prompt as token ids.
        messages: a chat; `(role, content)` or a mapping each, of OpenAI's form: `role`, `content`, `reasoning`,
            `tool_calls`, `tool_call_id`.
        tools: that the model may call, with messages: `{"type": "function", "function": {"name": ...}}` each.
        tool_choice: auto (the default), none, required, or `{"type": "function", "function": {"name": ...}}`.
        prompt: a raw prompt, tokenised as it is.
        max_tokens: most tokens of an answer, at least 1. Default: 256.
        temperature: 0 is greedy, at most 100. Default, as of the next four: what the model's generation_config.json
            says, else greedy (see `model.sampling_defaults`); the job's `reproducibility` has the values in force.
        top_k: keep the K likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens up to this mass, above 0 and at most 1 (all).
        min_p: drop tokens below this share of the likeliest, 0 (none) to 1.
        repetition_penalty: above 1 discourages repetition, 0.01 to 100.
        seed: the same seed gives the same tokens. Default: another one for every job.
        logprobs: report log-probabilities of the sampled and of the K best tokens, 0 to 100.
        presence_penalty: above 0 discourages tokens that the answer has, -2 to 2.
        frequency_penalty: the same, for each time that it has them, -2 to 2.
        stop: end an answer at any of these texts, at most 64.
        stop_token_ids: end an answer at any of these ids, at most 64.
        ignore_eos: do not stop at the model's end token.
        enable_thinking: what the chat template is told.
        structured_outputs: what the text of an answer must match, as vLLM has it: `{"json": schema}`,
            `{"json_object": True}`, `{"regex": ...}`, `{"choice": [...]}` or `{"grammar": ...}` (Lark).
        thinking_budget: after so many tokens of reasoning it is made to end; 0: an empty block.
        min_tokens: fewest tokens of an answer: before, no end token, stop id or stop string ends it.
        logit_bias: by token id, what is added to its logit, -100 to 100; at most 1024.
        priority: higher runs earlier. Default: 0.
        deadline_s: seconds from now until the job fails by itself, at most 30 days.
        attached: cancel the job when the stream that follows it ends.
        idempotency_key: the same key with the same request gives the job of the first call.
        labels: to find the job by, at most 32.
    """

    token_ids: Sequence[int] | None
    messages: Sequence[Mapping[str, Any] | tuple[str, str]] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    prompt: str | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    logprobs: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    enable_thinking: bool | None
    structured_outputs: Mapping[str, Any] | Constraint | None
    thinking_budget: int | None
    min_tokens: int
    logit_bias: Mapping[int, float] | None
    priority: int
    deadline_s: float | None
    attached: bool
    idempotency_key: str | None
    labels: Mapping[str, str] | None


def build_submit(document: object, question: str | Sequence[str] | None, options: SubmitOptions) -> pb.SubmitRequest:
    """Return the request of a `submit` call; its document is a text or one that the head has, files were sent before.

    Without an idempotency key a random one is set, so that trying again never queues a second job.

    Raises:
        InvalidRequest: not exactly one kind of input, or a value of the wrong type or range.
    """
    unknown = set(options) - set(SubmitOptions.__annotations__)
    if unknown:
        raise TypeError(f"submit() got an unexpected keyword argument {min(unknown)!r}")
    inputs = {name for name in ("token_ids", "messages", "prompt") if options.get(name) is not None}
    if len(inputs) + (document is not None) != 1:
        raise InvalidRequest("input: must be exactly one of document (with question), token_ids, messages, prompt")
    if options.get("tools") and "messages" not in inputs:
        raise InvalidRequest("tools: must be none without messages")
    if (document is None) != (question is None):
        raise InvalidRequest("question: goes with a document, and a document needs at least one question")
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = pb.SubmitRequest(
        sampling=pb.Sampling(**{name: _option(name, values[name]) for name in OPTIONS if name in values}),
        priority=validate.check_integer("priority", values.get("priority", 0), -MAX_INT32 - 1, MAX_INT32),
        attached=validate.check_flag("attached", options.get("attached", False)),
        idempotency_key=validate.check_text("idempotency_key", values.get("idempotency_key") or secrets.token_hex(16)),
        labels=validate.check_labels(values.get("labels") or {}),
        **_input(document, question, values),
    )
    if "deadline_s" in values:
        request.deadline_s = validate.check_number("deadline_s", values["deadline_s"], 0, MAX_DEADLINE_S, above=True)
    validate.check_submit(request)
    size = request.ByteSize()
    if size > MAX_REQUEST_BYTES:
        raise too_large(str(request.WhichOneof("input")), size)
    return request


def _option(name: str, value: object) -> Any:
    """Return a checked option as its field takes it."""
    checked = validate.check_option(name, value)
    if name == "logit_bias":
        return [pb.TokenBias(token_id=one.token_id, bias=one.bias) for one in checked]
    return pb.StructuredOutputs(kind=checked.kind, text=checked.text) if isinstance(checked, Constraint) else checked


def too_large(key: str, size: int) -> InvalidRequest:
    """Return the error of an input that does not fit into one message."""
    return InvalidRequest(
        f"{key}: {size} bytes: must be at most {MAX_REQUEST_BYTES} in one request; send long texts as a document"
    )


def _input(document: object, question: object, values: dict[str, Any]) -> dict[str, Any]:
    """Return the field of the input, of which exactly one is given."""
    if "token_ids" in values:
        return {"token_ids": pb.TokenIds(ids=validate.check_token_ids("token_ids", values["token_ids"]))}
    if "messages" in values:
        return {"chat": _chat(values)}
    if "prompt" in values:
        return {"prompt": validate.check_text("prompt", values["prompt"])}
    questions = _questions(question)
    if isinstance(document, str):
        text = validate.check_text("document", document)
        return {"document": pb.DocumentQuestions(text=text, questions=questions)}
    if isinstance(document, Document):
        return {"document": pb.DocumentQuestions(document_id=document.id, questions=questions)}
    shown = validate.show(document)
    raise InvalidRequest(f"document: {shown}: must be text, a path object, a list of them, or an uploaded document")


def _chat(values: Mapping[str, Any]) -> pb.Chat:
    messages = read_messages(values["messages"])
    tools, choice = read_tools(values.get("tools")), read_tool_choice(values.get("tool_choice"))
    check_chat(messages, tools, choice)
    return pb.Chat(
        messages=[pb.Message(**asdict(message)) for message in messages],
        tools=[pb.Tool(**asdict(tool)) for tool in tools],
        tool_choice=pb.ToolChoice(**asdict(choice)) if tools else None,
    )


def _questions(question: object) -> list[str]:
    questions = validate.check_texts("question", question)
    if not questions:
        raise InvalidRequest("question: 0: must be at least one")
    validate.check_count("question", len(questions), MAX_QUESTIONS)
    for index, one in enumerate(questions):
        if not one.strip():
            raise InvalidRequest(f"question[{index}]: {one[:60]!r}: must not be empty")
    return questions


def check_id(kind: str, value: object) -> str:
    """Return the id of a "job" or "document" as text (raises InvalidRequest); the head says which ids exist."""
    return validate.check_text(f"{kind} id", value, MAX_CHARS)


def list_request(states: Collection[str], labels: Mapping[str, str] | None, limit: int | None) -> pb.ListRequest:
    """Return the request of the first page; `states` are names such as "queued" (raises InvalidRequest)."""
    known: dict[str, Any] = {name.lower(): number for name, number in pb.State.items() if number}
    is_list = isinstance(states, Collection) and not isinstance(states, (str, bytes))
    wrong = [state for state in states if state not in known] if is_list else [states]
    if wrong:
        raise InvalidRequest(f"states: {validate.show(wrong[0])}: must be a list of {', '.join(known)}")
    size = PAGE_SIZE if limit is None else min(validate.check_integer("limit", limit, 1, MAX_INT64), PAGE_SIZE)
    labels = validate.check_labels(labels or {})
    return pb.ListRequest(states=[known[state] for state in states], labels=labels, page_size=size)


def needs_upload(document: object) -> bool:
    """Whether a document goes up in pieces before the job: files, or a text too long for one message."""
    if isinstance(document, str):
        return len(document) > PIECE_BYTES or len(document.encode("utf-8", "replace")) > PIECE_BYTES
    return isinstance(document, (os.PathLike, list, tuple, DocumentText))


def build_read(document_id: str) -> pb.SubmitRequest:
    """Return the request of a job that reads a document and asks nothing; repeated, it is the same job."""
    return pb.SubmitRequest(
        document=pb.DocumentQuestions(document_id=check_id("document", document_id), read=True),
        idempotency_key=secrets.token_hex(16),
    )
