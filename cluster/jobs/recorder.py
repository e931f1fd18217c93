"""The thread that commits the engine's events to the job store, then notifies the subscribers.

The engine's callbacks only put events into a queue. The thread takes all that are queued and commits them in one
transaction: a token is on disk before anybody sees it, and a slow disk makes transactions larger, not more.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from cluster.common.watched_thread import WatchedThread
from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.jobs.blame import Progress
from cluster.jobs.model import ACTIVE, JobAnswer, JobState, PromptToken
from cluster.jobs.store import JobStore, StateChange
from cluster.jobs.store_retry import StoreAbandoned, StoreRetry
from cluster.scheduler.request import FinishReason
from protos.jobs.limits import MAX_INT64
from protos.stage.messages import SampledToken

_log = logging.getLogger(__name__)
_DETAILED = 16  # answers of a job that keep figures of every layer and attention head: tens of kilobytes each


@dataclass(slots=True)
class LiveJob:
    """A job of this head that has not ended, since it was queued; dictionaries are by question."""

    job_id: str
    num_answers: int
    prompt_tokens: int = 0  # of all its questions
    deadline: float | None = None  # by the clock of the service, as `attached_at`
    attached_at: float | None = None  # an attached job must be followed soon after; None: noticed, or not attached
    handles: list[RequestHandle] = field(default_factory=list)  # empty while no pipeline has it
    cancelled: bool = False  # somebody wants it to end
    broken: bool = False  # it cannot go on: nothing of it is committed any more
    decodes: bool = False  # its first token since it was queued is committed
    progress: dict[int, PrefillProgress] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)  # tokens of this head

    @property
    def reached(self) -> Progress:
        """How far the job has come under this head."""
        return sum(self.generated.values()), sum(progress.processed for progress in self.progress.values())


_Item = tuple[LiveJob, int, EngineEvent]  # job, question, event


@dataclass(slots=True)
class _Step:
    """What a group of events writes."""

    tokens: list[tuple[str, OutputToken]] = field(default_factory=list)
    states: list[StateChange] = field(default_factory=list)
    answers: list[tuple[str, JobAnswer]] = field(default_factory=list)


class Recorder:
    """The committing thread. `close` commits what is queued and ends it; may be called twice.

    Failure contract: while the store refuses, events wait. When it refuses those of one job for good, that job is
    `broken` and ends with the reason; the events of others are committed.
    """

    def __init__(
        self, store: JobStore, notify: Callable[[Sequence[str]], None], on_ended: Callable[[str], None],
        on_broken: Callable[[str, BaseException | str], None] = lambda job_id, reason: None,
        problem: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        """
        Args:
            notify: called with the ids of the jobs of which something was committed.
            on_ended: called with the id of a job whose last answer was committed, before `notify`.
            on_broken: called with the id of a job that cannot go on, and why; no event of it is committed any more.
            problem: what is wrong with the store as a whole ("": nothing); events wait meanwhile.
        """
        self._store = store
        self._notify = notify
        self._on_ended = on_ended
        self._on_broken = on_broken
        self._closing = threading.Event()
        self._retry = StoreRetry(self._closing, problem)
        # events of jobs; Event: set when all before it is committed; None: the end
        self._queue: queue.SimpleQueue[_Item | threading.Event | None] = queue.SimpleQueue()
        self._groups: deque[list[_Item]] = deque()  # taken from the queue and not committed, as `_waiting`
        self._waiting: list[threading.Event] = []
        self._is_open = True
        self.thread = WatchedThread(self._run, "recorder", self._closing)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        self.thread.join()

    def callback(self, job: LiveJob, question: int) -> Callable[[EngineEvent], None]:
        """Return what the engine calls for one question of a job."""
        return lambda event: self._queue.put((job, question, event))

    def flush(self) -> None:
        """Return once every event queued so far is committed, or the recorder has ended."""
        committed = threading.Event()
        self._queue.put(committed)
        while not committed.wait(1.0) and self.thread.is_alive():
            pass

    def _run(self) -> None:
        """Commit until `close`; what an exception interrupts is gone on with by the next call."""
        while True:
            while self._groups:
                self._commit_first()
            while self._waiting:
                self._waiting.pop().set()
            if not self._is_open:
                return
            self._take(self._queue.get())
            while not self._queue.empty():
                self._take(self._queue.get())

    def _take(self, item: _Item | threading.Event | None) -> None:
        if item is None:
            self._is_open = False
        elif isinstance(item, threading.Event):
            self._waiting.append(item)
        elif self._groups:
            self._groups[-1].append(item)
        else:
            self._groups.append([item])

    def _commit_first(self) -> None:
        """Commit the first group in one transaction; one that is refused for good is committed job by job."""
        group = [item for item in self._groups[0] if not item[0].broken]
        try:
            step = _step(group)
            self._retry(lambda: self._store.commit_step(step.tokens, step.states, step.answers))
        except StoreAbandoned:
            raise
        except BaseException as error:  # noqa: BLE001 - what one job has must not end the others
            jobs = {job.job_id: job for job, *_ in group}
            self._groups.popleft()
            if len(jobs) > 1:
                self._groups.extendleft(reversed([[i for i in group if i[0] is job] for job in jobs.values()]))
                return
            for job in jobs.values():
                _log.exception("job %s: what it generated cannot be stored", job.job_id)
                job.broken = True
                self._on_broken(job.job_id, error)
            return
        self._groups.popleft()
        self._tell(group)

    def _tell(self, group: Sequence[_Item]) -> None:
        """Note in the jobs what was committed, and tell those who wait for it."""
        for job, question, event in group:
            if isinstance(event, PrefillProgress):
                job.progress[question] = event
            elif isinstance(event, OutputToken):
                job.generated[question] = job.generated.get(question, 0) + 1
                job.decodes = True
            elif event.finish_reason is not FinishReason.ERROR:
                job.ended[question] = event.finish_reason
                if len(job.ended) == job.num_answers:
                    self._on_ended(job.job_id)
            elif event.is_own_error and not job.broken:
                job.broken = True
                self._on_broken(job.job_id, event.error)
        self._notify(list({job.job_id for job, *_ in group}))


def _step(group: Sequence[_Item]) -> _Step:
    """Return what events write; the jobs stay as they are."""
    step = _Step()
    decoding: set[str] = set()
    ended: dict[str, dict[int, FinishReason]] = {}
    for job, question, event in group:
        if isinstance(event, PrefillProgress):
            step.states.append((job.job_id, frozenset({JobState.QUEUED, JobState.RECOVERING}), JobState.PREFILLING))
        elif isinstance(event, OutputToken):
            step.tokens.append((job.job_id, event))
            if not job.decodes and job.job_id not in decoding:
                decoding.add(job.job_id)
                step.states.append((job.job_id, frozenset({JobState.PREFILLING}), JobState.DECODING))
        elif event.finish_reason is not FinishReason.ERROR:  # a failed pipeline is replaced, its questions go on
            answers = ended.setdefault(job.job_id, dict(job.ended))
            step.answers.append((job.job_id, _answer(question, event, detailed=len(answers) < _DETAILED)))
            answers[question] = event.finish_reason
            if len(answers) == job.num_answers:
                is_cancelled = FinishReason.CANCELLED in answers.values()
                step.states.append((job.job_id, ACTIVE, JobState.CANCELLED if is_cancelled else JobState.SUCCEEDED))
    return step


def _answer(question: int, result: Generation, detailed: bool) -> JobAnswer:
    attention = result.attention.to_json() if result.attention else {}
    if not detailed:
        attention.pop("layers", None)
    return JobAnswer(
        question=question,
        prompt_tokens=result.prompt_tokens,
        cached_tokens=result.cached_tokens,
        finish_reason=result.finish_reason.value,
        text=result.text,
        reasoning=result.reasoning,
        timings=asdict(result.timings),
        attention=attention,
        prompt=tuple(PromptToken(one.token_id, one.logprob, one.top) for one in result.prompt),
    )


def committed_tokens(store: JobStore, job_id: str) -> dict[int, list[SampledToken]]:
    """Return the committed tokens of a job by question, after which it is resumed."""
    done: dict[int, list[SampledToken]] = {}
    for token in store.tokens(job_id, limit=MAX_INT64):
        done.setdefault(token.question, []).append(SampledToken(0, token.token_id, token.logprob, token.top))
    return done
