"""The job service: validates, stores, queues, recovers. It owns the running cluster and the live jobs.

Failure contract: a job is durable once `submit` returned. Tokens are committed before anyone sees them. When the
pipeline breaks, it is started again and unfinished jobs go on after their last committed token; when the head dies, the
next head does the same. Cancelling, waiting and reading are idempotent; submitting is, with an idempotency key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.common.errors import EngineError
from cluster.engine.outputs import GenerationSpec, Progress
from cluster.engine.request_handle import Ticket
from cluster.engine.runtime import Session
from cluster.jobs.api import JobEvent, ServiceLimits
from cluster.jobs.documents import Documents
from cluster.jobs.model import (
    ACTIVE,
    Busy,
    DocumentRecord,
    InvalidJob,
    JobRecord,
    JobSpec,
    JobState,
    JobToken,
    NotAllowedNow,
    NotFound,
    check_id,
    new_id,
)
from cluster.jobs.prompts import job_prompts, reasoning_opened
from cluster.jobs.recorder import LiveJob, Recorder, Watch, committed_tokens
from cluster.jobs.store import JobStore
from cluster.jobs.subscriptions import Following
from cluster.jobs.supervisor import Recovery
from cluster.jobs.timers import Keeper
from protos.stage.messages import SampledToken

_MAX_RESTARTS = 10  # a job that always breaks the cluster must not do so for ever
_ATTACH_WITHIN_S = 60.0  # an attached job nobody follows for this long is cancelled
_RECOVERY_ENDS_S = 60.0
_SHUTTING_DOWN = "the head is shutting down: submit again in a moment"
_MAX_QUEUED_TOKENS = 1 << 26  # prompt tokens of unfinished jobs; 4 bytes each


class JobService:
    """Implements `JobServiceApi` over a running session, a store and a folder of documents."""

    def __init__(
        self, session: Session, store: JobStore, documents: Documents, limits: ServiceLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._session = session
        self._store = store
        self._documents = documents
        self._limits = limits
        self._clock = clock
        self._watch = Watch()
        self._recorder = Recorder(store, self._watch, self._on_broken)
        self._lock = threading.RLock()  # live jobs and tickets
        self._live: dict[str, LiveJob] = {}
        self._tickets: dict[str, list[Ticket]] = {}
        self._queued_tokens: dict[str, int] = {}
        self._following = Following(store, self._watch, self.get, self.progress, self._cancel)
        self._keeper = Keeper(clock, self._sweep)
        self._on_ended: list[Callable[[JobRecord, dict[int, int]], None]] = []
        self._closing = False
        self._refusal = ""  # why no job is taken any more
        self._recovery = Recovery(self)
        session.on_broken = self._recorder.report
        self._started = clock()

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what an earlier head left unfinished, and begin to work. The session must be running."""
        self._recorder.start()
        if error := self._session.engine.error:  # it broke before anybody listened
            self._recorder.report(lambda: error)
        for record in self._store.unfinished():
            self._store.transition(record.id, ACTIVE, JobState.RECOVERING, now=self._clock())
            self._requeue(record)
        self._keeper.start()

    def drain(self, timeout_s: float) -> None:
        """Refuse new jobs and wait for the running ones; what is left continues under the next head."""
        self._refusal = _SHUTTING_DOWN
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            with self._lock:
                if not self._live:
                    return
            time.sleep(0.1)

    def close(self) -> None:
        """Stop without touching the state of unfinished jobs; may be called twice."""
        self._refusal = _SHUTTING_DOWN
        self._closing = True
        self._keeper.close()
        with self._lock:
            for job in self._live.values():
                job.generation += 1  # what the closing engine says about them is not their end
        self._recovery.close(_RECOVERY_ENDS_S)  # the session must not be started again while its owner closes it
        self._recorder.close()
        self._watch.close()

    # --- documents ---------------------------------------------------------------------------------------------------

    def upload(self, name: str, pieces: Iterable[bytes]) -> DocumentRecord:
        return self._documents.put(name, pieces, self._limits.max_document_bytes)

    def document(self, document_id: str) -> DocumentRecord:
        return self._documents.get(document_id)

    def documents(self) -> Sequence[DocumentRecord]:
        return self._documents.list()

    def delete_document(self, document_id: str) -> None:
        self.document(document_id)
        self._documents.delete(document_id)

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec) -> JobRecord:
        if (known := self._store.find(spec)) is not None:  # a repeated submission is answered whatever goes on
            return known
        if self._refusal:
            raise Busy(self._refusal, 5.0)
        if spec.deadline is not None and spec.deadline <= self._clock():
            raise InvalidJob("deadline_s: already over: must be in the future")
        waiting, _ = self.counts()
        if waiting >= self._limits.max_queued_jobs:
            raise Busy(f"queue: {waiting} jobs wait, the limit is server.max_queued_jobs", 10.0)
        prompts = self._prompts(spec)
        with self._lock:
            size = sum(len(prompt) for prompt in prompts)
            held = sum(self._queued_tokens.values())
            if held and held + size > _MAX_QUEUED_TOKENS:
                raise Busy(f"queue: unfinished jobs hold {held} prompt tokens", 30.0)
            record, is_new = self._store.create(
                spec, new_id("job"), spec.input.num_answers, self._session.reproducibility(spec.ask.sampling.seed)
            )
            if is_new:
                self._enqueue(record, prompts, {})
        return record

    def get(self, job_id: str) -> JobRecord:
        record = self._store.get(check_id(job_id, "job"))
        if record is None:
            raise NotFound(f"job {job_id}: not found (it may have expired)")
        return record

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[JobToken]:
        return self._store.tokens(job_id, after, limit)

    def progress(self, job_id: str) -> Mapping[int, Progress]:
        job = self._live.get(job_id)
        return dict(job.progress) if job else {}

    def jobs(
        self, states: Sequence[JobState], labels: Mapping[str, str], limit: int, cursor: str
    ) -> tuple[Sequence[JobRecord], str]:
        return self._store.list(states, labels, limit, cursor)

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        return self._following.wait(job_id, timeout_s)

    def stream(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        record = self.get(job_id)
        if after > record.last_event:
            raise InvalidJob(f"after: {after}: must be between 0 and {record.last_event}, the newest token")
        return self._following.events(job_id, after, record.spec.attached)

    def cancel(self, job_id: str) -> JobRecord:
        record = self.get(job_id)
        if record.state.is_final:
            return record
        self._cancel(job_id)
        return self.wait(job_id, 30.0)

    def delete(self, job_id: str) -> None:
        if not self.get(job_id).state.is_final or not self._store.delete(job_id):
            raise NotAllowedNow(f"job {job_id}: still runs: cancel it first")
        self._watch.forget(job_id)

    def counts(self) -> tuple[int, int]:
        """Jobs that wait and jobs that run."""
        waiting = self._store.count([JobState.QUEUED, JobState.RECOVERING])
        return waiting, self._store.count([JobState.PREFILLING, JobState.DECODING])

    def on_ended(self, callback: Callable[[JobRecord, dict[int, int]], None]) -> None:
        """Call with every job that ends, and its number of tokens by question (metrics)."""
        self._on_ended.append(callback)

    def status(self) -> Mapping[str, Any]:
        waiting, running = self.counts()
        uptime = self._clock() - self._started
        status = dict(self._session.status()) | {"queued": waiting, "running": running, "uptime_s": uptime}
        if self._recovery.state != "running":
            status["stages"] = [stage | {"state": self._recovery.state} for stage in status["stages"]]
        return status

    def check_integrity(self) -> None:
        """Verify the engine's pages (tests, debugging)."""
        self._session.engine.check_integrity()

    # --- internals ---------------------------------------------------------------------------------------------------

    def _prompts(self, spec: JobSpec) -> list[array[int]]:
        """Token ids of every question. Raises InvalidJob or NotFound."""
        prompts = job_prompts(self._session, self._documents, spec)
        if document_id := spec.input.document_id:
            self._store.touch_document(document_id, self._clock() + self._limits.document_ttl_s)
        return prompts

    def _requeue(self, record: JobRecord) -> None:
        """Queue a job again after its last committed token; one that cannot be built any more fails."""
        try:
            if record.restarts >= _MAX_RESTARTS:
                raise InvalidJob(f"given up: the cluster was restarted {record.restarts} times under this job")
            prompts = self._prompts(record.spec)
        except (InvalidJob, NotFound) as error:
            self._cancel(record.id, str(error))
            return
        with self._lock:
            job, current = self._live.get(record.id), self._store.get(record.id)
            if record.id in self._tickets:
                return  # a submission or another recovery was faster
            if job is not None and job.cancelled:
                self._store.transition(record.id, ACTIVE, JobState.CANCELLED, now=self._clock())
            if current is None or current.state.is_final or (job is not None and job.cancelled):
                self._ended(record.id)
            else:
                self._enqueue(current, prompts, committed_tokens(self._store, record.id))

    def _enqueue(
        self, record: JobRecord, prompts: Sequence[array[int]], done: Mapping[int, Sequence[SampledToken]]
    ) -> None:
        """Hand a job's unfinished questions to the engine (lock held)."""
        finished = {answer.question: answer.finish_reason for answer in record.answers if answer.finish_reason}
        job = self._live.get(record.id)
        if job is None:
            job = LiveJob(record.id, record.spec.input.num_answers, record.last_event, lambda s: self._ended(record.id))
            self._live[record.id] = job
        job.last_event = record.last_event
        job.restore(finished)
        self._queued_tokens[record.id] = sum(len(prompt) for prompt in prompts)
        ask = record.spec.ask
        opened = reasoning_opened(self._session.tokenizer, record.spec)
        items = []
        for question, prompt in enumerate(prompts):
            if question not in finished:
                spec = GenerationSpec(
                    prompt, ask.max_tokens, ask.sampling, ask.stop, ask.stop_token_ids, ask.ignore_eos, opened,
                    record.spec.priority, tuple(done.get(question, ())),
                )  # fmt: skip
                items.append((spec, self._recorder.callback(job, question)))
        self._arm(record)
        try:
            self._tickets[record.id] = self._session.engine.submit_all(items)
        except EngineError as error:  # recovery queues the job again
            if self._recovery.state == "down":
                self._cancel(record.id, str(error))

    def _cancel(self, job_id: str, failure: str = "") -> None:
        """Cancel a live job, or with `failure` let it fail with that error; its questions stop within a step."""
        with self._lock:
            if job := self._live.get(job_id):
                job.cancelled = True  # for a recovery that has not queued it again yet
            tickets = self._tickets.get(job_id, [])
            if failure or not tickets:
                end = JobState.FAILED if failure else JobState.CANCELLED
                self._store.transition(job_id, ACTIVE, end, error=failure, now=self._clock())
            with contextlib.suppress(EngineError):
                for ticket in tickets:
                    self._session.engine.cancel(ticket)
            if not tickets:  # no engine will say that it has ended
                self._ended(job_id)
        self._watch.touch([job_id])

    def _ended(self, job_id: str) -> None:
        with self._lock:
            job = self._live.pop(job_id, None)
            self._tickets.pop(job_id, None)
            self._queued_tokens.pop(job_id, None)
        if job is None:
            return
        record = self._store.get(job_id)
        if record is not None:
            for callback in self._on_ended:
                callback(record, job.generated)

    # --- time and recovery -------------------------------------------------------------------------------------------

    def _arm(self, record: JobRecord) -> None:
        job_id, deadline = record.id, record.spec.deadline  # not the record: it may be large, and the deadline far
        if deadline is not None:
            self._keeper.at(deadline, lambda: self._cancel(job_id, "deadline exceeded"))
        if record.spec.attached:
            self._keeper.at(self._clock() + _ATTACH_WITHIN_S, lambda: self._cancel_unfollowed(job_id))

    def _cancel_unfollowed(self, job_id: str) -> None:
        if not self._following.is_followed(job_id):
            self._cancel(job_id)

    def _sweep(self, now: float) -> None:
        self._store.expire(now, self._limits.result_ttl_s)
        self._documents.sweep(now)

    def _on_broken(self, error: str) -> None:
        """The pipeline failed, with jobs or idle: start another one and go on (called by the recorder)."""
        with self._lock:
            if self._closing or not self._recovery.begin():
                return
            unfinished = list(self._live)
            for job in self._live.values():
                job.generation += 1
            self._tickets.clear()
        for job_id in unfinished:
            self._store.transition(job_id, ACTIVE, JobState.RECOVERING, now=self._clock())
        self._watch.touch(unfinished)
        self._recovery.go(error)

    def restart_pipeline(self) -> None:
        self._session.restart()

    def pipeline_is_down(self, reason: str) -> None:
        self._refusal = f"the pipeline is down and the head must be restarted: {reason}"
        with self._lock:
            for job_id in list(self._live):
                self._cancel(job_id, reason)

    def pipeline_is_back(self) -> None:
        if error := self._session.engine.error:  # broken again: until now its report was taken for an old one
            self._recorder.report(lambda: error)
        with self._lock:
            for job_id, job in self._live.items():
                if job_id not in self._tickets:  # with one it runs on the new pipeline already
                    job.generation += 1  # what was said about the time without a pipeline is over
        for record in self._store.unfinished():
            if not self._closing:
                self._requeue(record)
