"""What clients hand out: jobs, answers, documents, events and the cluster's status, as plain frozen values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.client.errors import REATTACH_RETRIES, JobFailed, LongreachError, RetryPolicy, Unavailable
from protos.jobs import jobs_pb2 as pb

FINAL = frozenset({"succeeded", "failed", "cancelled"})
_PARTS = {pb.REASONING: "reasoning", pb.ANSWER: "answer"}


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A stored document; times are seconds since 1970."""

    id: str
    name: str
    size_bytes: int
    created: float
    expires: float

    @classmethod
    def read(cls, message: pb.Document) -> DocumentInfo:
        return cls(message.id, message.name, message.size_bytes, message.created, message.expires)


@dataclass(frozen=True, slots=True)
class Progress:
    """Prefill of one question in tokens; `processed` counts cached ones too."""

    total: int = 0
    cached: int = 0
    processed: int = 0
    eta_ms: int | None = None

    @classmethod
    def read(cls, message: pb.Progress) -> Progress:
        eta = message.eta_ms if message.HasField("eta_ms") else None
        return cls(message.total, message.cached, message.processed, eta)


@dataclass(frozen=True, slots=True)
class Token:
    """A token and the text that became certain with it (often empty); `top` has (token id, log-probability).

    In streams `part` says whether the output is "reasoning" or "answer" now, and `reasoning` and `answer` are `text`
    apart, without tags. Elsewhere, and from a head that does not know parts, `part` is empty.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    part: str = ""
    reasoning: str = ""
    answer: str = ""

    @classmethod
    def read(cls, message: pb.Token) -> Token:
        logprob = message.logprob if message.HasField("logprob") else None
        top = tuple((t.token_id, t.logprob) for t in message.top)
        part = _PARTS.get(message.part, "")
        return cls(message.token_id, message.text, logprob, top, part, message.reasoning, message.answer)


@dataclass(frozen=True, slots=True)
class Answer:
    """One question's answer as far as it has come; `finish_reason` is empty while it runs."""

    question: str
    text: str
    reasoning: str | None
    finish_reason: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    progress: Progress
    tokens: tuple[Token, ...] = ()
    attention: Mapping[str, Any] = field(default_factory=dict)  # how the prompt attended, once it has ended

    @classmethod
    def read(cls, message: pb.Answer) -> Answer:
        return cls(
            message.question, message.text, message.reasoning if message.HasField("reasoning") else None,
            message.finish_reason, tuple(message.token_ids), message.prompt_tokens, message.cached_tokens,
            Progress.read(message.progress), tuple(map(Token.read, message.tokens)),
            _attention(message.attention) if message.HasField("attention") else {},
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobData:
    """A job as the head last described it; times are seconds since 1970, timings are seconds."""

    id: str
    state: str  # queued, prefilling, decoding, recovering, succeeded, failed, cancelled
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

    @classmethod
    def read(cls, message: pb.Job) -> JobData:
        return cls(
            message.id, pb.State.Name(message.state).lower(), message.created,
            message.started if message.HasField("started") else None,
            message.finished if message.HasField("finished") else None,
            message.priority, message.document_id, tuple(map(Answer.read, message.answers)), message.error,
            dict(message.labels), message.last_event, message.restarts,
            _plain(message.timings) if message.HasField("timings") else {},
            _plain(message.reproducibility) if message.HasField("reproducibility") else {},
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The job as plain data, for `--json`."""
        return asdict(self)


def _attention(message: pb.AttentionSummary) -> dict[str, Any]:
    """As `longreach run --json` shows it; the figures of the layers in the precision they were sent in."""
    values = {item.name: getattr(message, item.name) for item in message.DESCRIPTOR.fields}
    layers = [
        {"layer": layer.layer}
        | {
            item.name: [round(value, 4) for value in getattr(layer, item.name)]
            for item in layer.DESCRIPTOR.fields
            if item.name != "layer"
        }
        for layer in message.layers
    ]
    return values | {"layers": layers}


def _plain(message: Any) -> dict[str, Any]:
    values = {item.name: getattr(message, item.name) for item in message.DESCRIPTOR.fields}
    return {name: value if isinstance(value, (int, float, str)) else dict(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One process of the pipeline."""

    stage: int
    rank: int
    state: str
    steps_done: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster at one moment; `kv_usage` is a share from 0 to 1."""

    model: str
    max_model_len: int
    queued: int
    running: int
    kv_usage: float
    kv_tokens: int
    stages: tuple[StageStatus, ...]
    uptime_s: float
    version: str

    @classmethod
    def read(cls, message: pb.ClusterStatusReply) -> ClusterStatus:
        stages = tuple(StageStatus(s.stage, s.rank, s.state, s.steps_done, s.resident_bytes) for s in message.stages)
        return cls(
            message.model, message.max_model_len, message.queued, message.running, message.kv_usage,
            message.kv_tokens, stages, message.uptime_s, message.version,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Prefill of one question (index) went on."""

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
    """The last event of a stream."""

    job: JobData


Event = ProgressEvent | TokenEvent | JobEnded


class JobView:
    """What is known of a job without asking the head; the base of both clients' jobs."""

    def __init__(self, data: JobData, many: bool | None = None) -> None:
        self.data = data
        self._many = many

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state}>"

    @property
    def id(self) -> str:
        return self.data.id

    @property
    def state(self) -> str:
        """queued, prefilling, decoding, recovering, succeeded, failed or cancelled; as of the last answer."""
        return self.data.state

    @property
    def done(self) -> bool:
        return self.state in FINAL

    @property
    def error(self) -> str:
        return self.data.error

    @property
    def labels(self) -> Mapping[str, str]:
        return self.data.labels

    @property
    def answers(self) -> list[Answer]:
        """Answers as far as they are known, in the order of the questions."""
        return list(self.data.answers)

    @property
    def progress(self) -> Progress:
        """Of the first unfinished question, else of the last one."""
        open_answers = [answer for answer in self.data.answers if not answer.finish_reason]
        chosen = open_answers[:1] or self.data.answers[-1:]
        return chosen[0].progress if chosen else Progress()

    def _result(self) -> Answer | list[Answer]:
        """The answers of an ended job: a list when several were asked for. Raises JobFailed."""
        if self.state != "succeeded":
            raise JobFailed(self)
        many = self._many if self._many is not None else len(self.data.answers) != 1
        return self.answers if many else self.data.answers[0]


class StreamCursor:
    """Where a stream of events stands: hands out every token once, and says how long to pause before re-attaching."""

    def __init__(self, after: int = 0, retries: RetryPolicy = REATTACH_RETRIES) -> None:
        self.after = after
        self._retries = retries
        self._delays: Iterator[float] = retries.delays()
        self._processed: dict[int, int] = {}

    def events(self, message: pb.JobEvent) -> Iterator[Event | JobData]:
        """What a message says that is new, as `accept` says it; a group of tokens one by one."""
        if message.WhichOneof("event") != "tokens":
            messages = [message]
        else:
            first = message.number - len(message.tokens.tokens) + 1
            messages = [pb.JobEvent(number=n, token=token) for n, token in enumerate(message.tokens.tokens, first)]
        return (event for event in map(self.accept, messages) if event is not None)

    def accept(self, message: pb.JobEvent) -> Event | JobData | None:
        """The event of a message; JobData for a change of state, None for a token that was seen before.

        Raises:
            Unavailable: tokens are missing before this one; re-attach after the last.
        """
        kind = message.WhichOneof("event")
        if kind == "token":
            if message.number <= self.after:
                return None
            if message.number != self.after + 1:
                raise Unavailable(f"stream: token {message.number} came after {self.after}: some are missing")
            self.after = message.number
            self._delays = self._retries.delays()
            return TokenEvent(message.token.question, Token.read(message.token.token), message.number)
        if kind == "progress":
            event = ProgressEvent(message.progress.question, Progress.read(message.progress.progress))
            # progress that does not move does not count: a head that dies right after it must not be tried forever
            if event.progress.processed > self._processed.get(event.question, -1):
                self._processed[event.question] = event.progress.processed
                self._delays = self._retries.delays()
            return event
        if kind == "job":
            data = JobData.read(message.job)
            return JobEnded(data) if data.state in FINAL else data
        return None  # a kind that a newer head knows

    def pause(self, error: LongreachError) -> float:
        """Seconds to sleep before the next try; raises `error` when there were enough or it is not about reaching."""
        if not isinstance(error, Unavailable):
            raise error
        delay = next(self._delays, None)
        if delay is None:
            raise error
        return delay
