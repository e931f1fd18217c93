"""Jobs and documents between `cluster.jobs.model` and the messages of jobs.proto.

Requests are decoded strictly: whatever is out of range raises InvalidJob of one line with key, value and range.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from google.protobuf import json_format

from cluster.common.text_format import show_value
from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import (
    DocumentRecord,
    InvalidJob,
    JobAnswer,
    JobInput,
    JobRecord,
    JobSpec,
    JobState,
    check_id,
)
from cluster.jobs.subscriptions import ProgressUpdate
from protos.errors import UserError
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.limits import MAX_CHARS, MAX_INT64, MAX_PAGE, MAX_WAIT_S

_DEFAULT_PAGE = 100
_ROLES = ("system", "user", "assistant", "tool")


@contextmanager
def _invalid_jobs() -> Iterator[None]:
    """Turn the errors of `protos.jobs.validate` into InvalidJob."""
    try:
        yield
    except UserError as error:
        raise InvalidJob(str(error)) from error


def decode_submit(request: pb.SubmitRequest, now: float, store_text: Callable[[str], str]) -> JobSpec:
    """Return what a client asked for. A document given as text is stored last, when all else is known to be right.

    Args:
        now: seconds since 1970; the deadline is counted from it.
        store_text: stores a document and returns its id.

    Raises:
        InvalidJob; and whatever `store_text` raises.
    """
    with _invalid_jobs():
        options = validate.check_submit(request)
    deadline = now + request.deadline_s if request.HasField("deadline_s") else None
    key, labels = request.idempotency_key, dict(request.labels)
    if not request.sampling.HasField("seed"):
        options = replace(options, sampling=replace(options.sampling, seed=_fresh_seed(key)))
    source = _decode_input(request, store_text)
    return JobSpec(source, options, request.priority, deadline, request.attached, key, labels)


def _fresh_seed(idempotency_key: str) -> int:
    """Return a seed nobody asked for: another one for every job, the same one when a submission is repeated."""
    digest = hashlib.sha256(idempotency_key.encode()).digest() if idempotency_key else secrets.token_bytes(8)
    return int.from_bytes(digest[:8]) & MAX_INT64


def _decode_input(request: pb.SubmitRequest, store_text: Callable[[str], str]) -> JobInput:
    kind = request.WhichOneof("input")
    if kind == "document":
        return _decode_document(request.document, store_text)
    if kind == "token_ids":
        _at_least_one("token_ids", len(request.token_ids.ids))
        return JobInput(token_ids=tuple(request.token_ids.ids))
    if kind == "chat":
        messages = request.chat.messages
        _at_least_one("chat.messages", len(messages))
        for message in messages:
            if message.role not in _ROLES:
                raise InvalidJob(f"chat.messages.role: {show_value(message.role)}: must be one of {', '.join(_ROLES)}")
        return JobInput(messages=tuple((message.role, message.content) for message in messages))
    if kind == "prompt":
        _at_least_one("prompt", len(request.prompt))
        return JobInput(prompt=request.prompt)
    raise InvalidJob("input: (missing): must be one of document with questions, token_ids, chat, prompt")


def _decode_document(source: pb.DocumentQuestions, store_text: Callable[[str], str]) -> JobInput:
    _at_least_one("document.questions", len(source.questions))
    for index, question in enumerate(source.questions):
        if not question.strip():
            raise InvalidJob(f"document.questions: {show_value(question)} at index {index}: must not be empty")
    kind = source.WhichOneof("document")
    if kind is None:
        raise InvalidJob("document: (missing): must have text or document_id")
    if kind == "text":
        _at_least_one("document.text", len(source.text))
        document_id = store_text(source.text)
    else:
        document_id = check_id(source.document_id, "doc")
    return JobInput(document_id=document_id, questions=tuple(source.questions))


def _at_least_one(key: str, count: int) -> None:
    if not count:
        raise InvalidJob(f"{key}: empty: must have at least one")


def decode_list(request: pb.ListRequest) -> tuple[list[JobState], dict[str, str], int, str]:
    """Return (states, labels, page size, cursor) of a search. Raises InvalidJob."""
    with _invalid_jobs():
        validate.check_count("states", len(request.states), 4 * len(_STATES))
        validate.check_count("page_size", request.page_size, MAX_PAGE)
        cursor = validate.check_text("page_token", request.page_token, MAX_CHARS)
        labels = validate.check_labels(request.labels)
    states = [decode_state(value) for value in request.states]
    return list(dict.fromkeys(states)), labels, request.page_size or _DEFAULT_PAGE, cursor


def decode_state(value: int) -> JobState:
    """Return a state by its number in the messages. Raises InvalidJob for numbers without a meaning."""
    if value not in _BY_NUMBER:
        names = ", ".join(state.name for state in JobState)
        raise InvalidJob(f"states: {value}: must be one of {names}")
    return _BY_NUMBER[value]


def decode_timeout(request: pb.WaitRequest) -> float:
    """Return the seconds to wait, 0 to 3600. Raises InvalidJob."""
    with _invalid_jobs():
        return validate.check_number("timeout_s", request.timeout_s, 0.0, MAX_WAIT_S, unit=" of seconds")


def decode_after(request: pb.StreamRequest) -> int:
    """Return the number after which events follow. Raises InvalidJob."""
    with _invalid_jobs():
        validate.check_count("after", request.after, MAX_INT64)
    return request.after


def decode_name(header: pb.DocumentHeader) -> str:
    """Return the name of a document, for people. Raises InvalidJob."""
    with _invalid_jobs():
        return validate.check_text("name", header.name, MAX_CHARS)


# --- answers ----------------------------------------------------------------------------------------------------------

_STATES: dict[JobState, pb.State] = {state: getattr(pb, state.name) for state in JobState}
_PARTS = {"reasoning": pb.REASONING, "answer": pb.ANSWER}
_BY_NUMBER: dict[int, JobState] = {int(number): state for state, number in _STATES.items()}


def encode_document(record: DocumentRecord) -> pb.Document:
    return pb.Document(**asdict(record))


def encode_job(
    record: JobRecord, tokens: Sequence[OutputToken] | None = None,
    progress: Mapping[int, PrefillProgress] | None = None,
) -> pb.Job:  # fmt: skip
    """Return a job with one answer a question.

    Args:
        tokens: all of its tokens; without them there are no token lists, no figures of layers, and no text of an
            answer that still runs.
        progress: by question.
    """
    spec = record.spec
    job = pb.Job(
        id=record.id, state=_STATES[record.state], created=record.created, started=record.started,
        finished=record.finished, priority=spec.priority, document_id=spec.input.document_id, error=record.error,
        labels=dict(spec.labels), last_event=record.last_event, restarts=record.restarts,
    )  # fmt: skip
    answers = {answer.question: answer for answer in record.answers}
    by_question: dict[int, list[OutputToken]] = {}
    for token in tokens or ():
        by_question.setdefault(token.question, []).append(token)
    with_logprobs = spec.ask.sampling.logprobs is not None
    for index in range(spec.input.num_answers):
        answer = answers.get(index, JobAnswer(index))
        message = _encode_answer(answer, by_question.get(index, []), with_logprobs)
        if tokens is None and answer.attention:
            message.attention.ClearField("layers")
        if spec.input.questions:
            message.question = spec.input.questions[index]
        if progress and index in progress:
            message.progress.CopyFrom(encode_progress(progress[index]))
        job.answers.append(message)
    _add_timings(job, record.answers)
    if record.reproducibility:  # a later head may have stored more than this one knows
        json_format.ParseDict(dict(record.reproducibility), job.reproducibility, ignore_unknown_fields=True)
    return job


def _encode_answer(answer: JobAnswer, tokens: Sequence[OutputToken], with_logprobs: bool) -> pb.Answer:
    message = pb.Answer(
        token_ids=[token.token_id for token in tokens], tokens=map(encode_token, tokens) if with_logprobs else (),
        text=answer.text if answer.finish_reason else "".join(token.text for token in tokens),
        reasoning=answer.reasoning, finish_reason=answer.finish_reason, prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
    )  # fmt: skip
    if answer.attention:
        json_format.ParseDict(dict(answer.attention), message.attention, ignore_unknown_fields=True)
    return message


def _add_timings(job: pb.Job, answers: Sequence[JobAnswer]) -> None:
    """Set the seconds of a job: until the first of its answers began and had a token, else of the longest answer."""
    known = [answer.timings for answer in answers if answer.timings]
    for key, choose in (("queued_s", min), ("ttft_s", min), ("prefill_s", max), ("decode_s", max), ("total_s", max)):
        values = [timings[key] for timings in known if key in timings and math.isfinite(timings[key])]
        if values:
            setattr(job.timings, key, choose(values))


def encode_token(token: OutputToken) -> pb.Token:
    """Return a token as part of an answer; in a stream, `encode_tokens` adds the part it belongs to."""
    top = [pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return pb.Token(token_id=token.token_id, text=token.text, logprob=token.logprob, top=top)


def encode_progress(progress: PrefillProgress) -> pb.Progress:
    return pb.Progress(**asdict(progress))


def encode_progress_event(update: ProgressUpdate, number: int) -> pb.JobEvent:
    """Return a progress event; `number` is that of the token before it."""
    event = pb.ProgressEvent(question=update.question, progress=encode_progress(update.progress))
    return pb.JobEvent(number=number, progress=event)


def encode_tokens(tokens: Sequence[OutputToken], grouped: bool) -> Iterator[pb.JobEvent]:
    """Yield tokens of a stream (at least one): several as one event if they may be `grouped`, else an event each."""
    if grouped and len(tokens) > 1:
        yield pb.JobEvent(number=tokens[-1].number, tokens=pb.TokenGroup(tokens=map(_token_event, tokens)))
    else:
        for token in tokens:
            yield pb.JobEvent(number=token.number, token=_token_event(token))


def _token_event(token: OutputToken) -> pb.TokenEvent:
    message = encode_token(token)
    message.part, message.reasoning, message.answer = _PARTS[token.part], token.reasoning, token.answer
    return pb.TokenEvent(question=token.question, token=message)


def encode_status(status: Mapping[str, Any]) -> pb.ClusterStatusReply:
    """Return a reply from its fields by name; an unknown one is our bug (ParseError)."""
    return json_format.ParseDict(dict(status), pb.ClusterStatusReply())
