"""The thread that commits the engine's events to the job store, then notifies the subscribers.

The engine's callbacks only put events into a queue. The thread takes all that are queued and commits them in one
transaction: a token is on disk before anybody sees it, and a slow disk makes transactions larger, not more.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.jobs.model import ACTIVE, JobAnswer, JobState
from cluster.jobs.store import JobStore, StateChange
from cluster.scheduler.request import FinishReason
from protos.jobs.limits import MAX_INT64
from protos.stage.messages import SampledToken

_log = logging.getLogger(__name__)
_RETRY_S = 1.0  # between attempts to write to a disk that refuses
_DETAILED = 16  # answers of a job that keep figures of every layer and attention head: tens of kilobytes each


@dataclass(slots=True)
class LiveJob:
    """A job of this head that has not ended, since it was queued; dictionaries are by question."""

    job_id: str
    num_answers: int
    prompt_tokens: int = 0  # of all its questions
    deadline: float | None = None  # seconds since 1970, as `follow_by`
    follow_by: float | None = None  # a stream of an attached job must be open by then
    handles: list[RequestHandle] = field(default_factory=list)  # empty while no pipeline has it
    cancelled: bool = False  # somebody wants it to end
    decodes: bool = False  # its first token since it was queued is committed
    progress: dict[int, PrefillProgress] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)  # tokens of this head


_Item = tuple[LiveJob, int, EngineEvent]  # job, question, event


class Recorder:
    """The committing thread. `close` commits what is queued and ends it; may be called twice."""

    def __init__(
        self, store: JobStore, notify: Callable[[Sequence[str]], None], on_ended: Callable[[str], None]
    ) -> None:
        """
        Args:
            notify: called with the ids of the jobs of which something was committed.
            on_ended: called with the id of a job whose last answer was committed, before `notify`.
        """
        self._store = store
        self._notify = notify
        self._on_ended = on_ended
        self._closing = threading.Event()
        # events of jobs; Event: set when all before it is committed; None: the end
        self._queue: queue.SimpleQueue[_Item | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def callback(self, job: LiveJob, question: int) -> Callable[[EngineEvent], None]:
        """Return what the engine calls for one question of a job."""
        return lambda event: self._queue.put((job, question, event))

    def flush(self) -> None:
        """Return once every event queued so far is committed, or the recorder has ended."""
        committed = threading.Event()
        self._queue.put(committed)
        while not committed.wait(1.0) and self._thread.is_alive():
            pass

    def _run(self) -> None:
        is_open = True
        while is_open:
            items = [self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get())
            if events := [item for item in items if isinstance(item, tuple)]:
                self._commit_events(events)
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            is_open = None not in items

    def _commit_events(self, items: Sequence[_Item]) -> None:
        tokens: list[tuple[str, OutputToken]] = []
        states: list[StateChange] = []
        answers: list[tuple[str, JobAnswer]] = []
        ended: list[str] = []
        for job, question, event in items:
            if isinstance(event, PrefillProgress):
                job.progress[question] = event
                states.append((job.job_id, frozenset({JobState.QUEUED, JobState.RECOVERING}), JobState.PREFILLING))
            elif isinstance(event, OutputToken):
                job.generated[question] = job.generated.get(question, 0) + 1
                tokens.append((job.job_id, event))
                if not job.decodes:
                    job.decodes = True
                    states.append((job.job_id, frozenset({JobState.PREFILLING}), JobState.DECODING))
            elif event.finish_reason is not FinishReason.ERROR:  # a failed pipeline is replaced, its questions go on
                answers.append((job.job_id, _answer(question, event, detailed=len(job.ended) < _DETAILED)))
                job.ended[question] = event.finish_reason
                if len(job.ended) == job.num_answers:
                    is_cancelled = FinishReason.CANCELLED in job.ended.values()
                    final = JobState.CANCELLED if is_cancelled else JobState.SUCCEEDED
                    states.append((job.job_id, ACTIVE, final))
                    ended.append(job.job_id)
        self._write(tokens, states, answers)
        for job_id in ended:
            self._on_ended(job_id)
        self._notify(list({job.job_id for job, *_ in items}))

    def _write(
        self, tokens: Sequence[tuple[str, OutputToken]], states: Sequence[StateChange],
        answers: Sequence[tuple[str, JobAnswer]],
    ) -> None:  # fmt: skip
        """Commit, however long the disk refuses: jobs wait for it and lose nothing. Raises only when closing."""
        while True:
            try:
                self._store.commit_step(tokens, states, answers)
                return
            except JobStoreError as error:
                if not isinstance(error.__cause__, (sqlite3.Error, OSError)):
                    raise  # a step that does not follow the last one: our own bug
                _log.error("%s; trying again", error)
                if self._closing.wait(_RETRY_S):
                    raise


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
    )


def committed_tokens(store: JobStore, job_id: str) -> dict[int, list[SampledToken]]:
    """Return the committed tokens of a job by question, after which it is resumed."""
    done: dict[int, list[SampledToken]] = {}
    for token in store.tokens(job_id, limit=MAX_INT64):
        done.setdefault(token.question, []).append(SampledToken(0, token.token_id, token.logprob, token.top))
    return done
