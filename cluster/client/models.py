"""What clients hand out: jobs, answers, documents, events and the cluster's status, as plain frozen values.

The fields are those of the messages in jobs.proto, which `read_message` reads by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.client.errors import JobFailed, LongreachError, Unavailable
from cluster.client.retry import REATTACH_RETRIES, RetryPolicy
from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import read_message

FINAL = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Document:
    """A document that the head keeps: the same bytes give the same `id`, `name` is for people.

    Times are seconds since 1970; every use moves `used` and `expires` on, and a `pinned` document never expires (0).
    `tokens` is 0 until it has been counted. `scale_len` is the length, in tokens, whose length scale its jobs use, 0
    when each job has its own. Of its first `stored_tokens` tokens the KV is stored, so a question need not wait until
    they are read; `stored_bytes` are those of all its KV, also that of its questions. `parent` is the id of the
    document it was appended to, `source_hash` the SHA-256 of the file its text was taken from, and `kernel_family`
    says which kernels computed KV that was imported; all three are empty where there is none. A `shared` document is
    seen by every API key of the head, others by keys of its owner's name only.
    """

    id: str
    name: str
    size_bytes: int
    created: float
    expires: float
    tokens: int = 0
    scale_len: int = 0
    pinned: bool = False
    used: float = 0.0
    stored_tokens: int = 0
    stored_bytes: int = 0
    parent: str = ""
    source_hash: str = ""
    kernel_family: str = ""
    shared: bool = False


@dataclass(frozen=True, slots=True)
class TokenCount:
    """How long a text is: `tokens` by the head's tokenizer, `size_bytes` as UTF-8.

    `max_model_len` bounds a prompt (the document, a question, some tokens of the chat template) and its answer.
    """

    tokens: int
    size_bytes: int
    max_model_len: int

    @property
    def fits(self) -> bool:
        """Whether the text alone is shorter than what the model takes."""
        return self.tokens < self.max_model_len


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt of one question has been read (prefill), in tokens; `processed` counts cached ones too.

    `eta_ms` are the milliseconds expected until the first token of the answer, None when there is no estimate.
    """

    total: int = 0
    cached: int = 0
    processed: int = 0
    eta_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token and the text that became certain with it, often empty since a character may need several tokens.

    `logprob` and `top`, pairs of (token id, log-probability), are there when `logprobs` was asked for. In streams
    `part` says whether the output is "reasoning" or "answer" now, and `reasoning` and `answer` are `text` apart,
    without tags. Elsewhere, and from a head that does not know parts, `part` is empty.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    part: str = ""
    reasoning: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question as far as it has come.

    `finish_reason` is "stop", "length", "cancelled" or "error", and empty while it runs. `text` is without the
    `reasoning` of a thinking model, which is None when there is none; `token_ids` has both. `tokens` are there when
    `logprobs` was asked for. `attention` says how the prompt attended, once the answer has ended: mode, density,
    recall and figures of every layer. Listings leave `token_ids`, `tokens` and the layers out.
    """

    question: str
    text: str
    reasoning: str | None
    finish_reason: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    progress: Progress
    tokens: tuple[Token, ...] = ()
    attention: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobData:
    """A job as the head last described it.

    `state` is queued, prefilling, decoding, recovering, succeeded, failed or cancelled; `error` says why a job failed.
    Times are seconds since 1970, None for what has not happened yet; `timings` (`queued_s`, `prefill_s`, `ttft_s`,
    `decode_s`, `total_s`) are seconds. `last_event` is the number of the newest token, `restarts` counts how often
    another head took the job up, and `reproducibility` is what the same tokens need: model, versions, the values of
    sampling that were in force with the seed, and so on. A job to `read` a document has one answer, an empty one.
    """

    id: str
    state: str
    created: float
    started: float | None
    finished: float | None
    priority: int
    document_id: str
    answers: tuple[Answer, ...]
    error: str
    labels: Mapping[str, str]
    last_event: int
    restarts: int
    timings: Mapping[str, float] = field(default_factory=dict)
    reproducibility: Mapping[str, Any] = field(default_factory=dict)
    read: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the job as plain data that `json.dumps` takes; texts are None if the model has no tokenizer."""
        data = asdict(self)
        if not self.has_text:
            data["answers"] = [answer | {"text": None} for answer in data["answers"]]
        return data

    @property
    def has_text(self) -> bool:
        """Whether the model has a tokenizer; without one, answers are token ids alone and every `text` is empty."""
        return bool(self.reproducibility.get("versions", {}).get("tokenizer") != "none")


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One process of the pipeline: its `stage` and its `rank` within it, both from 0, and its memory in bytes.

    `late` counts messages of processes that were replaced, which it has refused.
    """

    stage: int
    rank: int
    state: str
    steps_done: int
    resident_bytes: int
    late: int = 0


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster at one moment: `queued` and `running` count jobs, `kv_usage` is a share from 0 to 1.

    `max_model_len` bounds a prompt and its answer together, `kv_tokens` is what the KV cache holds, both in tokens.
    `kv_store_bytes` of KV are stored on disk, at most `kv_store_max_bytes` (0: none, or not known yet).
    After `repairs` failures of the pipeline only some stages were replaced, after `full_restarts` all of it was; the
    newest recovery took `last_recovery_s`. `epoch` is 1 when a pipeline is started, and one more with each repair.
    `problem` says why the head does not serve as it should and is empty when all is well. `http_url` is where it serves
    OpenAI's protocols, empty where it does not. `own_only`: the API key is no admin's, so jobs are those of its name,
    and `kv_usage` and `kv_store_bytes`, which show what others do, are 0.
    """

    model: str
    max_model_len: int
    queued: int
    running: int
    kv_usage: float
    kv_tokens: int
    stages: tuple[StageStatus, ...]
    uptime_s: float
    version: str
    problem: str = ""
    kv_store_bytes: int = 0
    kv_store_max_bytes: int = 0
    repairs: int = 0
    full_restarts: int = 0
    last_recovery_s: float = 0.0
    epoch: int = 0
    http_url: str = ""
    own_only: bool = False


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """The prompt of one question (its index) has been read further."""

    question: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of one question's answer; `number` counts all tokens of the job from 1."""

    question: int
    token: Token
    number: int


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The last event of a stream, with the job and its answers, whether it succeeded or not."""

    job: JobData


Event = ProgressEvent | TokenEvent | JobEnded


class BaseJob:
    """What is known of a job without asking the head; the base of both clients' jobs."""

    def __init__(self, data: JobData, many: bool | None = None) -> None:
        """Take what the head said; `many`: whether the result is a list (None: when there are several answers)."""
        self.data = data
        self._many = many

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state}>"

    @property
    def id(self) -> str:
        """`job_` and 32 hexadecimal digits; `client.job(id)` finds the job again."""
        return self.data.id

    @property
    def state(self) -> str:
        """queued, prefilling, decoding, recovering, succeeded, failed or cancelled; as of the last call."""
        return self.data.state

    @property
    def done(self) -> bool:
        """Whether the job has succeeded, failed or been cancelled."""
        return self.state in FINAL

    @property
    def error(self) -> str:
        """Why the job failed, else empty."""
        return self.data.error

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels that were submitted."""
        return self.data.labels

    @property
    def answers(self) -> list[Answer]:
        """Answers as far as they are known, in the order of the questions."""
        return list(self.data.answers)

    @property
    def progress(self) -> Progress:
        """Progress of the first unfinished question, else of the last one."""
        unfinished = [answer for answer in self.data.answers if not answer.finish_reason]
        chosen = unfinished[:1] or self.data.answers[-1:]
        return chosen[0].progress if chosen else Progress()

    def _result(self) -> Answer | list[Answer]:
        """Return the answers of an ended job: a list when several were asked for. Raises JobFailed."""
        if self.state != "succeeded":
            raise JobFailed(self)
        many = self._many if self._many is not None else len(self.data.answers) != 1
        return self.answers if many else self.data.answers[0]


class StreamCursor:
    """Position in a job's stream of events: yields every token once, and says how long to pause before re-attaching."""

    def __init__(self, after: int = 0, retries: RetryPolicy = REATTACH_RETRIES) -> None:
        """Begin after token number `after`."""
        self.after = after
        self._retries = retries
        self._delays: Iterator[float] = retries.delays()
        self._processed: dict[int, int] = {}

    def events(self, message: pb.JobEvent) -> Iterator[ProgressEvent | TokenEvent]:
        """Yield progress and tokens of a message that are new; nothing of other kinds.

        Raises:
            Unavailable: tokens are missing before those of the message; re-attach after the last.
        """
        kind = message.WhichOneof("event")
        if kind == "token" or kind == "tokens":
            tokens = message.tokens.tokens if kind == "tokens" else [message.token]
            for number, event in enumerate(tokens, message.number - len(tokens) + 1):
                if number > self.after + 1:
                    raise Unavailable(f"stream: token {number} came after {self.after}: some are missing")
                if number > self.after:
                    self.after = number
                    self._delays = self._retries.delays()
                    yield TokenEvent(event.question, read_message(Token, event.token), number)
        elif kind == "progress":
            progress = read_message(Progress, message.progress.progress)
            # progress that does not move does not count: a head that dies right after it must not be tried forever
            if progress.processed > self._processed.get(message.progress.question, -1):
                self._processed[message.progress.question] = progress.processed
                self._delays = self._retries.delays()
            yield ProgressEvent(message.progress.question, progress)

    def pause(self, error: LongreachError) -> float:
        """Return the seconds to sleep before the next try; raise `error` when no further one is due."""
        delay = next(self._delays, None)
        if delay is None:
            raise error
        return delay
