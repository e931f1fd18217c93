"""The requests of the clients, built from what callers hand over. Bad values never reach the wire."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from cluster.client import validation as check
from cluster.client.errors import InvalidRequest
from protos.errors import UserError
from protos.jobs import jobs_pb2 as pb
from protos.stage.messages import MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from cluster.client.models import DocumentInfo

PIECE_BYTES = 1 << 20  # documents travel in pieces of this size; longer texts are uploaded
PAGE_SIZE = 100  # jobs a call when listing
MAX_QUESTIONS = 1024
MAX_DEADLINE_S = 30 * 86400.0
_INT32 = 1 << 31
_INTEGERS = {
    "max_tokens": (1, (1 << 32) - 1),
    "top_k": (0, 1 << 30),
    "seed": (0, (1 << 63) - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
_NUMBERS = {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": 100.0}


class SubmitOptions(TypedDict, total=False):
    """Keyword arguments of `submit` besides document and question. What is left out, the head decides."""

    token_ids: Sequence[int] | None
    messages: Sequence[Mapping[str, str] | tuple[str, str]] | None  # {"role": ..., "content": ...}
    prompt: str | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    logprobs: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    enable_thinking: bool | None
    priority: int  # higher runs earlier
    deadline_s: float | None  # from now until the job fails by itself
    attached: bool  # cancel when the stream that follows the job ends
    idempotency_key: str | None
    labels: Mapping[str, str] | None


def build_submit(
    document: str | DocumentInfo | None, question: str | Sequence[str] | None, options: SubmitOptions
) -> pb.SubmitRequest:
    """The request of a `submit` call; a document file has been uploaded before.

    Without an idempotency key a random one is set, so that trying again never queues a second job.

    Raises:
        InvalidRequest: not exactly one kind of input, or a value of the wrong type or range.
    """
    unknown = set(options) - set(SubmitOptions.__annotations__)
    if unknown:
        raise TypeError(f"submit() got an unexpected keyword argument {min(unknown)!r}")
    given = {name for name in ("token_ids", "messages", "prompt") if options.get(name) is not None}
    if len(given) + (document is not None) != 1:
        raise InvalidRequest("input: must be exactly one of document (with question), token_ids, messages, prompt")
    if (document is None) != (question is None):
        raise InvalidRequest("question: goes with a document, and a document needs at least one question")
    deadline = options.get("deadline_s")
    key = options.get("idempotency_key")
    request = pb.SubmitRequest(
        sampling=_sampling(options),
        priority=check.integer("priority", options.get("priority", 0), -_INT32, _INT32 - 1),
        deadline_s=None if deadline is None else check.number("deadline_s", deadline, 0, MAX_DEADLINE_S, above=True),
        attached=check.flag("attached", options.get("attached", False)),
        idempotency_key=check.text("idempotency_key", key, check.MAX_CHARS) if key else secrets.token_hex(16),
        labels=check.labels(options.get("labels") or {}),
    )
    _set_input(request, document, question, options)
    size = request.ByteSize()
    if size > check.MAX_REQUEST_BYTES:
        raise too_large(str(request.WhichOneof("input")), size)
    return request


def too_large(key: str, size: int) -> InvalidRequest:
    """The error of an input that does not fit into one message."""
    return InvalidRequest(
        f"{key}: {size} bytes: must be at most {check.MAX_REQUEST_BYTES} in one request; send long texts as a document"
    )


def _sampling(options: SubmitOptions) -> pb.Sampling:
    values: dict[str, Any] = {}
    for name, (low, high) in _INTEGERS.items():
        if (value := options.get(name)) is not None:
            values[name] = check.integer(name, value, low, high)
    for name, most in _NUMBERS.items():
        if (value := options.get(name)) is not None:
            values[name] = check.number(name, value, 0.0, most)
    try:
        SamplingParams(**{name: value for name, value in values.items() if name != "max_tokens"})
    except UserError as error:  # ranges that do not begin at 0
        raise InvalidRequest(str(error)) from error
    thinking = options.get("enable_thinking")
    return pb.Sampling(
        stop=check.texts("stop", options.get("stop") or (), check.MAX_STOPS, least_each=1),
        stop_token_ids=check.token_ids("stop_token_ids", options.get("stop_token_ids") or (), check.MAX_STOPS),
        ignore_eos=check.flag("ignore_eos", options.get("ignore_eos", False)),
        enable_thinking=None if thinking is None else check.flag("enable_thinking", thinking),
        **values,
    )


def _set_input(
    request: pb.SubmitRequest,
    document: str | DocumentInfo | None,
    question: str | Sequence[str] | None,
    options: SubmitOptions,
) -> None:
    if document is not None and question is not None:
        request.document.questions.extend(_questions(question))
        if isinstance(document, str):
            request.document.text = check.text("document", document)
        elif isinstance(getattr(document, "id", None), str):
            request.document.document_id = document.id
        else:
            shown = check.show(document)
            raise InvalidRequest(f"document: {shown}: must be text, a path object or an uploaded document")
    elif (token_ids := options.get("token_ids")) is not None:
        request.token_ids.CopyFrom(pb.TokenIds(ids=check.token_ids("token_ids", token_ids)))
    elif (messages := options.get("messages")) is not None:
        pairs = check.pairs(messages)
        request.chat.CopyFrom(pb.Chat(messages=[pb.Message(role=role, content=content) for role, content in pairs]))
    elif (prompt := options.get("prompt")) is not None:
        request.prompt = check.text("prompt", prompt)


def _questions(question: object) -> list[str]:
    questions = check.texts("question", question, MAX_QUESTIONS)
    if not questions:
        raise InvalidRequest("question: 0: must be at least one")
    for index, one in enumerate(questions):
        if not one.strip():
            raise InvalidRequest(f"question[{index}]: {one[:60]!r}: must not be empty")
    return questions


def job_request(job_id: object) -> pb.JobRequest:
    """For a call about one job (raises InvalidRequest); the head says which ids exist."""
    return pb.JobRequest(id=check.text("job id", job_id, check.MAX_CHARS))


def document_request(document_id: object) -> pb.DocumentRequest:
    """For a call about one document (raises InvalidRequest)."""
    return pb.DocumentRequest(id=check.text("document id", document_id, check.MAX_CHARS))


def check_after(after: object) -> int:
    """The token after which a stream begins (raises InvalidRequest)."""
    return check.integer("after", after, 0, (1 << 63) - 1)


def check_wait(timeout_s: object) -> float | None:
    """How long to wait; None for as long as it takes (raises InvalidRequest)."""
    return check.seconds("timeout_s", timeout_s)


def list_request(states: Collection[str], labels: Mapping[str, str] | None, limit: int | None) -> pb.ListRequest:
    """The first page's request; `states` are names such as "queued" (raises InvalidRequest)."""
    known: dict[str, Any] = {name.lower(): number for name, number in pb.State.items() if number}
    is_list = isinstance(states, Collection) and not isinstance(states, (str, bytes))
    wrong = [state for state in states if state not in known] if is_list else [states]
    if wrong:
        raise InvalidRequest(f"states: {check.show(wrong[0])}: must be a list of {', '.join(known)}")
    if limit is not None:
        limit = check.integer("limit", limit, 1, (1 << 63) - 1)
    size = PAGE_SIZE if limit is None else min(limit, PAGE_SIZE)
    return pb.ListRequest(states=[known[state] for state in states], labels=check.labels(labels or {}), page_size=size)


def needs_upload(document: object) -> bool:
    """Whether a document goes up in pieces before the job: a file, or a text too long for one message."""
    if isinstance(document, str):
        return len(document) > PIECE_BYTES or len(document.encode("utf-8", "replace")) > PIECE_BYTES
    return isinstance(document, os.PathLike)


def document_pieces(source: str | bytes | os.PathLike[str], name: str | None) -> Iterator[pb.DocumentPiece]:
    """The messages of an upload: the header, then pieces of `PIECE_BYTES`. A `str` is text; a path object a file.

    Raises:
        InvalidRequest: the file cannot be read, or the text has no UTF-8 form.
    """
    if name is not None:
        check.text("name", name, check.MAX_CHARS)
    if isinstance(source, (str, bytes)):
        data = check.text("document", source).encode() if isinstance(source, str) else source
        yield pb.DocumentPiece(header=pb.DocumentHeader(name=name or "text"))
        for start in range(0, len(data), PIECE_BYTES):
            yield pb.DocumentPiece(data=data[start : start + PIECE_BYTES])
        return
    if not isinstance(source, os.PathLike):
        raise InvalidRequest(f"document: {check.show(source)}: must be text, bytes or a path object")
    path = Path(source)
    try:
        with path.open("rb") as file:
            header = name or path.name.encode("utf-8", "replace").decode()[: check.MAX_CHARS]
            yield pb.DocumentPiece(header=pb.DocumentHeader(name=header))
            while data := file.read(PIECE_BYTES):
                yield pb.DocumentPiece(data=data)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a zero byte in the name
        raise InvalidRequest(f"document: {check.show(str(path))}: cannot be read ({error})") from error


def check_source(source: str | bytes | os.PathLike[str], name: str | None = None) -> None:
    """Refuse an unreadable file or text before a call is begun (raises InvalidRequest)."""
    next(document_pieces(source, name))
