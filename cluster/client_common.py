"""What both clients share: typed errors, where the head is, how often to try again, and how requests are built.

Importing this loads neither grpc nor ray; `cluster.client_wire` does, when a client makes its first connection.
"""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from protos import jobs_pb2 as pb
from protos.errors import UserError

if TYPE_CHECKING:
    from cluster.client_results import DocumentInfo, JobView

DEFAULT_ADDRESS = "127.0.0.1:7777"
DEFAULT_DATA_DIR = "~/.local/share/longreach"  # as in cluster.config_models
STATE_FILE = "head.json"  # under the data directory, while a head is ready
PIECE_BYTES = 1 << 20  # documents travel in pieces of this size; longer texts are uploaded
PAGE_SIZE = 100  # jobs a call when listing
WAY_OUT = "is a head running? start one with: longreach up CONFIG"


class LongreachError(Exception):
    """Base of every error of the clients; one line for the user."""


class InvalidRequest(LongreachError, UserError):
    """The request itself is wrong; sending it again will not help."""


class NotFound(LongreachError):
    """No such job or document."""


class Conflict(LongreachError):
    """An idempotency key used with another body, or a state that does not allow it."""


class Busy(LongreachError):
    """The queue is full; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(LongreachError):
    """The API key is missing or wrong."""


class Unavailable(LongreachError):
    """The head cannot be reached, or did not answer in time."""


class JobFailed(LongreachError):
    """The job failed or was cancelled; `job` has what came before that."""

    def __init__(self, job: JobView) -> None:
        super().__init__(f"{job.id}: {job.state}" + (f": {job.error}" if job.error else ""))
        self.job = job


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the head is and how to talk to it. `timeout_s` is for one call, without the time a job takes."""

    address: str = DEFAULT_ADDRESS
    api_key: str | None = None
    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not self.address.startswith("unix:") and not (host and port.isdecimal()):
            raise InvalidRequest(f"address: {self.address!r}: must be HOST:PORT such as {DEFAULT_ADDRESS}")
        if not self.timeout_s > 0:
            raise InvalidRequest(f"timeout_s: {self.timeout_s}: must be above 0")
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidRequest("cert_file, key_file: must be given together")

    @property
    def uses_tls(self) -> bool:
        return self.ca_file is not None or self.cert_file is not None

    @property
    def secret(self) -> str:
        """The API key given, else that of the environment variable LONGREACH_API_KEY, else empty."""
        return self.api_key if self.api_key is not None else os.environ.get("LONGREACH_API_KEY", "")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff: `attempts` tries in all, the first pause up to `first_s`, doubling up to `largest_s`."""

    attempts: int = 5
    first_s: float = 0.1
    largest_s: float = 5.0

    def delays(self) -> Iterator[float]:
        """Seconds to sleep between tries, each shortened at random by up to half so that clients spread out."""
        for step in range(self.attempts - 1):
            yield min(self.largest_s, self.first_s * 2**step) * random.uniform(0.5, 1.0)


CALL_RETRIES = RetryPolicy()  # about 1 s: a caller without a head should hear so soon
REATTACH_RETRIES = RetryPolicy(attempts=14, first_s=0.2, largest_s=10.0)  # over 1 min: a head may be restarting


def read_state(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a ready head wrote about itself: address, pid, started (seconds since 1970).

    Raises:
        Unavailable: no head is ready under this data directory.
    """
    path = Path(data_dir).expanduser() / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
        return {"address": str(state["address"]), "pid": int(state["pid"]), "started": float(state["started"])}
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror}): {WAY_OUT}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{path}: is not the state of a head: delete it, then: longreach up CONFIG") from error


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


_OPTIONAL = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "logprobs",
    "enable_thinking",
)  # fmt: skip


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
    try:
        request = pb.SubmitRequest(
            sampling=_sampling(options),
            priority=options.get("priority", 0),
            deadline_s=options.get("deadline_s"),
            attached=options.get("attached", False),
            idempotency_key=options.get("idempotency_key") or secrets.token_hex(16),
            labels=options.get("labels") or {},
        )
        _set_input(request, document, question, options)
    except (TypeError, ValueError) as error:  # protobuf says which value it cannot hold
        raise InvalidRequest(f"submit: {error}") from error
    return request


def _sampling(options: SubmitOptions) -> pb.Sampling:
    stop = options.get("stop") or ()
    values: dict[str, Any] = {name: options.get(name) for name in _OPTIONAL}
    return pb.Sampling(
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=options.get("stop_token_ids") or (),
        ignore_eos=options.get("ignore_eos", False),
        **values,
    )


def _set_input(
    request: pb.SubmitRequest,
    document: str | DocumentInfo | None,
    question: str | Sequence[str] | None,
    options: SubmitOptions,
) -> None:
    if document is not None and question is not None:
        request.document.questions.extend([question] if isinstance(question, str) else question)
        if not request.document.questions:
            raise ValueError("question: must have at least one")
        if isinstance(document, str):
            request.document.text = document
        else:
            request.document.document_id = document.id
    elif (token_ids := options.get("token_ids")) is not None:
        request.token_ids.CopyFrom(pb.TokenIds(ids=token_ids))
    elif (messages := options.get("messages")) is not None:
        pairs = [(m["role"], m["content"]) if isinstance(m, Mapping) else m for m in map(_check_message, messages)]
        request.chat.CopyFrom(pb.Chat(messages=[pb.Message(role=role, content=content) for role, content in pairs]))
    elif (prompt := options.get("prompt")) is not None:
        request.prompt = prompt


def _check_message(message: Mapping[str, str] | tuple[str, str]) -> Mapping[str, str] | tuple[str, str]:
    is_mapping = isinstance(message, Mapping) and message.keys() == {"role", "content"}
    if not is_mapping and not (isinstance(message, tuple) and len(message) == 2):
        raise ValueError("messages: each must have role and content and nothing else")
    return message


def list_request(states: Collection[str], labels: Mapping[str, str] | None, limit: int | None) -> pb.ListRequest:
    """The first page's request; `states` are names such as "queued" (raises InvalidRequest)."""
    known: dict[str, Any] = {name.lower(): number for name, number in pb.State.items() if number}
    wrong = [state for state in states if state not in known] if not isinstance(states, str) else [states]
    if wrong:
        raise InvalidRequest(f"states: {wrong[0]!r}: must be a list of {', '.join(known)}")
    if limit is not None and limit < 1:
        raise InvalidRequest(f"limit: {limit}: must be at least 1")
    size = PAGE_SIZE if limit is None else min(limit, PAGE_SIZE)
    return pb.ListRequest(states=[known[state] for state in states], labels=labels or {}, page_size=size)


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
    if isinstance(source, (str, bytes)):
        try:
            data = source.encode() if isinstance(source, str) else source
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"document: {error}: must be text that UTF-8 can hold") from error
        yield pb.DocumentPiece(header=pb.DocumentHeader(name=name or "text"))
        for start in range(0, len(data), PIECE_BYTES):
            yield pb.DocumentPiece(data=data[start : start + PIECE_BYTES])
        return
    path = Path(source)
    try:
        with path.open("rb") as file:
            yield pb.DocumentPiece(header=pb.DocumentHeader(name=name or path.name))
            while data := file.read(PIECE_BYTES):
                yield pb.DocumentPiece(data=data)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror})") from error


def check_source(source: str | bytes | os.PathLike[str]) -> None:
    """Refuse an unreadable file or text before a call is begun (raises InvalidRequest)."""
    next(document_pieces(source, None))
