"""A job as the control plane keeps it: what was asked, how far it has come, what came out. Plain values, no I/O.

A job asks one or more questions; each has an answer. Tokens of all answers of a job are numbered 1, 2, 3, ... in the
order they are committed in: the number is where a stream can begin again.

A token has five forms between sampler and client:

1. `protos.stage.messages.SampledToken`, from the last stage to the engine (on the wire as the message of that name);
2. `cluster.engine.outputs.OutputToken`, made once by the engine: numbered, decoded, reasoning split off; the recorder,
   the store, subscriptions and the gRPC server pass it on as it is;
3. the row of table `tokens` (`cluster.jobs.sqlite.database`);
4. the message `TokenEvent` of protos/jobs/jobs.proto, alone or in a `TokenGroup`;
5. `TokenEvent` of the client.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, TypeAdapter

from protos.errors import InvalidRequest
from protos.jobs.chat import AUTO, ChatMessage, Tool, ToolChoice
from protos.jobs.sampling import AnswerOptions, SamplingParams
from protos.stage.messages import TokenLogprob

_ID = re.compile(r"(job|doc|batch)_[0-9a-f]{32}")


class JobState(enum.StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    RECOVERING = "recovering"  # unfinished under an earlier head or pipeline, about to be queued again
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL


SCALE_TO_COME = -1  # `DocumentRecord.scale_len` until its tokens are counted
FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
ACTIVE = frozenset(JobState) - FINAL
WAITING = frozenset({JobState.QUEUED, JobState.RECOVERING})


class JobError(Exception):
    """A request about a job or document that is refused; one line for the user."""


class InvalidJob(JobError, InvalidRequest):
    """The request itself is wrong (gRPC INVALID_ARGUMENT)."""


class ContextTooLong(InvalidJob):
    """The prompt, alone or with the answer it asks for, does not fit the context of the model."""


class JobDamaged(InvalidJob):
    """What is stored of one job cannot be read. Only this job fails; nothing is wrong with the store as a whole."""


class DocumentDamaged(JobDamaged):
    """The file of one document cannot be read, or is not what was uploaded. Only the jobs about it fail."""


class JobNotFound(JobError):
    """No such job or document (gRPC NOT_FOUND)."""


def job_not_found(job_id: str) -> JobNotFound:
    """Return the error of a job that is not there, or not the caller's."""
    return JobNotFound(f"job {job_id}: not found (it may have expired)")


def document_not_found(document_id: str) -> JobNotFound:
    """Return the error of a document that is not there, or not the caller's."""
    return JobNotFound(f"document: {document_id}: not found: upload it again")


class JobConflict(JobError):
    """What is known already is used with something else: an idempotency key, a document (gRPC ALREADY_EXISTS)."""


class NotAllowedNow(JobError):
    """The state of the job or document does not allow it (gRPC FAILED_PRECONDITION)."""


class ServiceBusy(JobError):
    """The queue or another bound is full; try again after `retry_after_s` (gRPC RESOURCE_EXHAUSTED)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(JobError):
    """The head is shutting down, or no pipeline runs; try again after `retry_after_s` (gRPC UNAVAILABLE)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def new_id(kind: str) -> str:
    """Return a new id of a kind ("job", "doc", "batch"): its name, `_` and 32 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(16)}"


def check_id(value: str, kind: str) -> str:
    """Return an id of this kind, or raise InvalidJob; ids become file names and SQL parameters."""
    if not _ID.fullmatch(value) or not value.startswith(kind):
        raise InvalidJob(f"{kind} id: {value[:60]!r}: must be {kind}_ and 32 hexadecimal digits")
    return value


def _as_message(value: object) -> object:
    """Return what is stored of a message; earlier versions stored (role, content)."""
    return dict(zip(("role", "content"), value, strict=True)) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class JobInput:
    """What a job is about: exactly one of a stored document with questions, token ids, chat messages, a raw prompt."""

    document_id: str = ""
    questions: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Annotated[ChatMessage, BeforeValidator(_as_message)], ...] | None = None
    prompt: str | None = None
    read: bool = False  # the document is read, so that its KV is there; no questions
    tools: tuple[Tool, ...] = ()  # with messages: that the model may call
    tool_choice: ToolChoice = AUTO

    def __post_init__(self) -> None:
        kinds = [bool(self.document_id), self.token_ids is not None, self.messages is not None, self.prompt is not None]
        if sum(kinds) != 1:
            raise InvalidJob("input: must be exactly one of document with questions, token_ids, chat, prompt")
        if self.read and (not self.document_id or self.questions):
            raise InvalidJob("document.read: true: must have a document and no questions")
        if self.tools and self.messages is None:
            raise InvalidJob(f"tools: {len(self.tools)}: must be none without messages")

    @property
    def num_answers(self) -> int:
        return len(self.questions) if self.questions or (self.document_id and not self.read) else 1


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Everything a client asked for; `deadline` is in seconds since 1970."""

    input: JobInput
    ask: AnswerOptions
    priority: int = 0
    deadline: float | None = None
    attached: bool = False
    idempotency_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    cache_salt: str = ""  # it shares KV with jobs of the same one only
    shorten: bool = False  # `ask.max_tokens` is lowered to what the context has room for
    prompt_logprobs: int | None = None  # of the tokens of its prompts, with those of so many best ones; None: not asked
    cache_ttl_s: int = 0  # for so long after they were used, stored blocks of its prompts are dropped after all others
    request: str = ""  # JSON of what its protocol shows again with the job; nothing else reads it

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        """Read what `to_json` wrote."""
        return _SPEC.validate_json(text)

    def body_hash(self) -> str:
        """Return a SHA-256 that equal submissions share: of everything but the keys and the (relative) deadline.

        What is not said counts as greedy, as it was before models had defaults of their own; saying just that differs.
        """
        values = asdict(self)
        sampling, greedy = values["ask"]["sampling"], asdict(SamplingParams())
        for name in ("presence_penalty", "frequency_penalty"):
            if sampling[name] is None:
                del sampling[name]  # as before there was such a thing
        values["ask"]["sampling"] = {name: greedy[name] if v is None else v for name, v in sampling.items()}
        if said := [name for name in sampling if name != "seed" and sampling[name] == greedy[name] is not None]:
            values["said"] = said
        later = {"structured_outputs": None, "thinking_budget": None, "min_tokens": 0, "logit_bias": ()}
        for name in [name for name in later if values["ask"][name] == later[name]]:
            del values["ask"][name]  # as before there was such a thing
        own = {"request": "", "prompt_logprobs": None, "cache_ttl_s": 0}
        for name in [name for name in own if values[name] == own[name]]:
            del values[name]  # as before there was such a thing
        for key in ("idempotency_key", "deadline", "cache_salt"):
            del values[key]
        if values.pop("shorten"):  # what it was lowered to is not said by the client
            values["ask"]["max_tokens"] = 0
        source, empty = values["input"], {"read": False, "tools": (), "tool_choice": asdict(AUTO)}
        for name in [name for name in empty if source[name] == empty[name]]:
            del source[name]  # as before there was such a thing
        if self.input.messages is not None:
            source["messages"] = [
                (one.role, one.content) if one == ChatMessage(one.role, one.content) else asdict(one)
                for one in self.input.messages
            ]
        return hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


_SPEC = TypeAdapter(JobSpec)


class PromptToken(NamedTuple):
    """A token of a prompt with its log-probability, which the first one has not, and those of the best tokens."""

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class JobAnswer:
    """One question's answer. `finish_reason` is empty while it runs; text and reasoning are set when it has ended."""

    question: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    text: str = ""
    reasoning: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)  # fields of cluster.engine.outputs.Timings
    attention: Mapping[str, Any] = field(default_factory=dict)  # of cluster.engine.attention_report.AttentionSummary
    prompt: tuple[PromptToken, ...] = ()  # its tokens, if log-probabilities of them were asked for


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored; times are seconds since 1970.

    `restarts` counts how often it was queued again after it had run. Of a job with `damage` (why its row cannot be
    read) the spec is empty, and what else cannot be read is left out.
    """

    id: str
    state: JobState
    spec: JobSpec
    created: float
    started: float | None = None
    finished: float | None = None
    error: str = ""
    last_event: int = 0  # number of the newest token
    restarts: int = 0
    answers: tuple[JobAnswer, ...] = ()
    reproducibility: Mapping[str, Any] = field(default_factory=dict)
    damage: str = ""
    owner: str = ""  # name of the tenant

    @property
    def ask(self) -> AnswerOptions:
        """The options of its answers: what the client said, else what was in force when the job was submitted.

        Raises InvalidJob: what is stored of them cannot be read.
        """
        stored = self.reproducibility.get("sampling", {})  # absent from jobs of before, whose specs say every value
        try:
            known = {name: value for name, value in stored.items() if name in SamplingParams.__dataclass_fields__}
            defaults = SamplingParams(**known)
            return self.spec.ask.resolve(defaults, defaults.seed)
        except (AttributeError, TypeError, InvalidRequest) as error:
            raise InvalidJob(f"reproducibility.sampling: cannot be read ({error}): submit the job again") from error


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """A stored document; times are seconds since 1970, every use renews `expires`."""

    id: str
    name: str
    size_bytes: int
    created: float
    expires: float  # 0: never, it is pinned
    tokens: int = 0  # 0: not counted yet
    scale_len: int = 0  # length whose length scale its jobs use; 0: each job its own; SCALE_TO_COME
    pinned: bool = False
    used: float = 0.0
    parent: str = ""  # document that it was appended to, which may be gone
    source_hash: str = ""
    kernel_family: str = ""  # kernels that computed imported KV; empty: those of this cluster
    owner: str = ""  # name of the tenant
    shared: bool = False  # every tenant sees it
    purpose: str = ""  # of a file that nobody asks about: "batch", "batch_output"; its tokens are not counted
    seams: tuple[int, ...] = ()  # offsets, in bytes, of what was appended: parts are tokenised one by one
