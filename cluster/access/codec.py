"""Jobs and documents between `cluster.jobs.model` and the messages of jobs.proto.

Requests are decoded strictly: whatever is out of range raises InvalidRequest of one line with key, value and range.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from cluster.common.text_format import one_line, show_value
from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import DocumentRecord, JobAnswer, JobInput, JobRecord, JobSpec, JobState, check_id
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.chat import ChatMessage, Tool, ToolChoice, check_chat
from protos.jobs.convert import read_message
from protos.jobs.limits import MAX_CHARS, MAX_INT64, MAX_PAGE

_DEFAULT_PAGE = 100
_STATES: dict[JobState, pb.State] = {state: getattr(pb, state.name) for state in JobState}
_BY_NUMBER: dict[int, JobState] = {int(number): state for state, number in _STATES.items()}
# seconds of a job: until the first of its answers began and had a token, else of the longest answer
_TIMINGS: dict[str, Callable[[list[float]], float]] = {
    "queued_s": min, "ttft_s": min, "prefill_s": max, "decode_s": max, "total_s": max,
}  # fmt: skip
_READ_PRIORITY = -1  # of a job that reads a document, where none is said: those who ask go first
_PARTS = {"reasoning": pb.REASONING, "answer": pb.ANSWER}


def decode_submit(request: pb.SubmitRequest, now: float, store_text: Callable[[str], str]) -> JobSpec:
    """Return what a client asked for. A document given as text is stored last, when all else is known to be right.

    Args:
        now: seconds since 1970; the deadline is counted from it.
        store_text: stores a document and returns its id.

    Raises:
        InvalidRequest; and whatever `store_text` raises.
    """
    options = validate.check_submit(request)
    deadline = now + request.deadline_s if request.HasField("deadline_s") else None
    key = request.idempotency_key
    if not request.sampling.HasField("seed"):
        options = replace(options, sampling=replace(options.sampling, seed=_fresh_seed(key)))
    source = _decode_input(request, store_text)
    priority = request.priority
    if source.read:
        options = options.shortened(1)
        priority = priority or _READ_PRIORITY
    return JobSpec(source, options, priority, deadline, request.attached, key, dict(request.labels))


def _fresh_seed(idempotency_key: str) -> int:
    """Return a seed nobody asked for: another one for every job, the same one when a submission is repeated."""
    digest = hashlib.sha256(idempotency_key.encode()).digest() if idempotency_key else secrets.token_bytes(8)
    return int.from_bytes(digest[:8]) & MAX_INT64


def _decode_input(request: pb.SubmitRequest, store_text: Callable[[str], str]) -> JobInput:
    match request.WhichOneof("input"):
        case "document":
            return _decode_document(request.document, store_text)
        case "token_ids":
            return JobInput(token_ids=tuple(_at_least_one("token_ids", request.token_ids.ids)))
        case "chat":
            return _decode_chat(request.chat)
        case "prompt":
            return JobInput(prompt=_at_least_one("prompt", request.prompt))
    raise InvalidRequest("input: (missing): must be one of document with questions, token_ids, chat, prompt")


def _decode_chat(chat: pb.Chat) -> JobInput:
    messages = tuple(read_message(ChatMessage, message) for message in chat.messages)
    tools = tuple(read_message(Tool, tool) for tool in chat.tools)
    choice = read_message(ToolChoice, chat.tool_choice)
    choice = choice if choice.mode else replace(choice, mode="auto")
    check_chat(messages, tools, choice)
    return JobInput(messages=messages, tools=tools, tool_choice=choice)


def _decode_document(source: pb.DocumentQuestions, store_text: Callable[[str], str]) -> JobInput:
    if source.read and source.questions:
        raise InvalidRequest(f"document.questions: {len(source.questions)}: must be none with document.read")
    questions = tuple(source.questions if source.read else _at_least_one("document.questions", source.questions))
    for index, question in enumerate(questions):
        if not question.strip():
            raise InvalidRequest(f"document.questions: {show_value(question)} at index {index}: must not be empty")
    match source.WhichOneof("document"):
        case "text":
            return JobInput(store_text(_at_least_one("document.text", source.text)), questions, read=source.read)
        case "document_id":
            return JobInput(check_id(source.document_id, "doc"), questions, read=source.read)
    raise InvalidRequest("document: (missing): must have text or document_id")


def _at_least_one(key: str, values: Any) -> Any:
    """Return what has at least one element or character."""
    if not values:
        raise InvalidRequest(f"{key}: empty: must have at least one")
    return values


def encode_document(record: DocumentRecord, stored_tokens: int = 0, stored_bytes: int = 0) -> pb.Document:
    """Return a document with what is stored of its KV, see `JobService.stored_kv`."""
    hidden = ("seams", "owner", "purpose")
    values = {name: value for name, value in asdict(record).items() if name not in hidden}
    values["scale_len"] = max(0, record.scale_len)
    return pb.Document(**values, stored_tokens=stored_tokens, stored_bytes=stored_bytes)


def decode_list(request: pb.ListRequest) -> tuple[list[JobState], dict[str, str], int, str]:
    """Return (states, labels, page size, cursor) of a search. Raises InvalidRequest."""
    validate.check_count("states", len(request.states), 4 * len(_STATES))
    validate.check_count("page_size", request.page_size, MAX_PAGE)
    cursor = validate.check_text("page_token", request.page_token, MAX_CHARS)
    labels = validate.check_labels(request.labels)
    for number in request.states:
        if number not in _BY_NUMBER:
            raise InvalidRequest(f"states: {number}: must be one of {', '.join(state.name for state in JobState)}")
    states = [_BY_NUMBER[number] for number in dict.fromkeys(request.states)]
    return states, labels, request.page_size or _DEFAULT_PAGE, cursor


def encode_job(
    record: JobRecord, tokens: Sequence[OutputToken] | None = None,
    progress: Mapping[int, PrefillProgress] | None = None,
) -> pb.Job:  # fmt: skip
    """Return a job with one answer a question; one with values that no message can have, with an error only.

    Args:
        tokens: all of its tokens; without them there are no token lists, no figures of layers, and no text of an
            answer that still runs.
        progress: by question.
    """
    try:
        return _encode_job(record, tokens, progress)
    except (ValueError, TypeError, json_format.Error) as error:  # its rows are damaged: others are shown beside it
        problem = record.error or f"the stored job is damaged: {one_line(error, 200)}"
        return pb.Job(id=record.id, state=_STATES[record.state], error=problem)


def _encode_job(
    record: JobRecord, tokens: Sequence[OutputToken] | None, progress: Mapping[int, PrefillProgress] | None
) -> pb.Job:
    spec = record.spec
    job = pb.Job(
        id=record.id, state=_STATES[record.state], created=record.created, started=record.started,
        finished=record.finished, priority=spec.priority, document_id=spec.input.document_id, error=record.error,
        labels=dict(spec.labels), last_event=record.last_event, restarts=record.restarts, read=spec.input.read,
    )  # fmt: skip
    answers = {answer.question: answer for answer in record.answers}
    by_question: dict[int, list[OutputToken]] = defaultdict(list)
    for token in tokens or ():
        by_question[token.question].append(token)
    for index in range(spec.input.num_answers):
        answer, its_tokens = answers.get(index, JobAnswer(index)), by_question[index]
        message = job.answers.add(
            question=spec.input.questions[index] if spec.input.questions else "",
            token_ids=[token.token_id for token in its_tokens],
            tokens=() if spec.ask.sampling.logprobs is None else map(encode_token, its_tokens),
            text=answer.text if answer.finish_reason else "".join(token.answer for token in its_tokens),
            reasoning=answer.reasoning or "".join(token.reasoning for token in its_tokens) or None,
            finish_reason=answer.finish_reason,
            progress=asdict(progress[index]) if progress and index in progress else None,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
        )
        _fill(answer.attention, message.attention)
        if tokens is None and answer.attention:
            message.attention.ClearField("layers")
    if spec.input.read:  # its one token says nothing
        for message in job.answers:
            for name in ("token_ids", "tokens", "text", "reasoning"):
                message.ClearField(name)
    known = [answer.timings for answer in record.answers]
    for key, choose in _TIMINGS.items():
        if values := [timings[key] for timings in known if math.isfinite(timings.get(key, math.nan))]:
            setattr(job.timings, key, choose(values))
    _fill(record.reproducibility, job.reproducibility)
    return job


def _fill(values: Mapping[str, Any], message: Message) -> None:
    """Set the fields of a part of a job, if there are any; a later head may have stored more than this one knows."""
    if values:
        json_format.ParseDict(dict(values), message, ignore_unknown_fields=True)


def encode_token(token: OutputToken, **parts: Any) -> pb.Token:
    """Return a token as part of an answer; in a stream, `encode_tokens` adds the `parts` of the output."""
    top = [pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return pb.Token(token_id=token.token_id, text=token.text, logprob=token.logprob, top=top, **parts)


def encode_tokens(tokens: Sequence[OutputToken], grouped: bool) -> Iterator[pb.JobEvent]:
    """Yield tokens of a stream (at least one): several as one event if they may be `grouped`, else an event each."""
    if grouped and len(tokens) > 1:
        yield pb.JobEvent(number=tokens[-1].number, tokens=pb.TokenGroup(tokens=map(_token_event, tokens)))
    else:
        for token in tokens:
            yield pb.JobEvent(number=token.number, token=_token_event(token))


def _token_event(token: OutputToken) -> pb.TokenEvent:
    message = encode_token(token, part=_PARTS[token.part], reasoning=token.reasoning, answer=token.answer)
    return pb.TokenEvent(question=token.question, token=message)
