"""The job service: validates, stores, queues and resumes jobs.

Failure contract: a job is durable once `submit` has returned, a token before anybody sees it. When the pipeline fails,
its supervisor replaces it, and unfinished jobs go on after their last committed token; when the head process dies, the
next one does the same. Cancelling, waiting and reading are idempotent; submitting is, with an idempotency key.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from cluster.common.errors import EngineError
from cluster.config.schema import ServerSection
from cluster.engine.outputs import GenerationSpec, OutputToken, PrefillProgress
from cluster.engine.request_handle import RequestHandle
from cluster.engine.runtime import ClusterRuntime
from cluster.engine.supervisor import PipelineState
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import (
    ACTIVE,
    WAITING,
    InvalidJob,
    JobNotFound,
    JobRecord,
    JobSpec,
    JobState,
    NotAllowedNow,
    ServiceBusy,
    check_id,
    new_id,
)
from cluster.jobs.prompts import job_prompts, reasoning_opened
from cluster.jobs.recorder import LiveJob, Recorder, committed_tokens
from cluster.jobs.store import JobStore, check_queue
from cluster.jobs.subscriptions import JobEvent, Subscriptions
from cluster.scheduler.request import FinishReason
from protos.stage.messages import SampledToken

_log = logging.getLogger(__name__)
_MAX_RESTARTS = 10  # of one job: one that always breaks the pipeline must not do so for ever
_TICK_S = 0.25  # how late a job may be noticed that is out of time
_SWEEP_EVERY_S = 60.0  # how often expired jobs and documents are deleted
_ATTACH_WITHIN_S = 60.0  # an attached job that nobody follows for this long is cancelled
_MAX_QUEUED_TOKENS = 1 << 26  # prompt tokens of unfinished jobs; 4 bytes each


class JobService:
    """Runs jobs on a cluster runtime, with a store and a folder of documents.

    Methods raise the errors of `cluster.jobs.model`; all may be called from any thread.
    """

    def __init__(
        self, runtime: ClusterRuntime, store: JobStore, documents: DocumentStore, limits: ServerSection,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """
        Args:
            limits: `max_queued_jobs`, `result_ttl_s` and `document_ttl_s` bound what is kept.
            clock: gives seconds since 1970.
        """
        self._runtime = runtime
        self._supervisor = runtime.supervisor
        self._store = store
        self.documents = documents
        self._limits = limits
        self._clock = clock
        self._subscriptions = Subscriptions(store, self.get, self.progress, self._cancel)
        self._recorder = Recorder(store, self._subscriptions.notify, self._ended)
        self._lock = threading.RLock()  # live jobs
        self._live: dict[str, LiveJob] = {}
        self._timer = threading.Thread(target=self._watch_time, name="timer", daemon=True)
        self._on_ended: list[Callable[[JobRecord, dict[int, int]], None]] = []
        self._closing = threading.Event()
        self._draining = False  # no job is taken any more
        self._started = clock()

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Resume what an earlier head process left unfinished, and begin to work. The runtime must be running."""
        self._store.split_old_tokens(self._reasoning_opened)
        self._recorder.start()
        for record in self._store.unfinished():
            self._store.transition(record.id, ACTIVE, JobState.RECOVERING)
            self._requeue(record)
        self._timer.start()
        self._supervisor.supervise(self)

    def drain(self, timeout_s: float) -> None:
        """Refuse new jobs and wait for the running ones; the next head process continues what is left."""
        self._draining = True
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            with self._lock:
                if not self._live:
                    return
            time.sleep(0.1)

    def close(self) -> None:
        """Stop without touching the state of unfinished jobs; may be called twice."""
        self._draining = True
        self._closing.set()
        if self._timer.is_alive():
            self._timer.join()
        self._recorder.close()  # before the supervision ends: that waits for what is being recorded
        self._supervisor.release()  # the pipeline must not be started again while its owner closes it
        self._subscriptions.close()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec) -> JobRecord:
        """Validate, store and queue. Raises InvalidJob, JobNotFound (document), JobConflict, ServiceBusy."""
        known, waiting = self._store.admission(spec)
        if known is not None:  # a repeated submission is answered whatever goes on
            return known
        if self._draining:
            raise ServiceBusy("the head is shutting down: submit again in a moment", 5.0)
        if self._supervisor.state is PipelineState.DOWN:
            reason = f"the pipeline is down and the head must be restarted: {self._supervisor.reason}"
            raise ServiceBusy(reason, 5.0)
        if spec.deadline is not None and spec.deadline <= self._clock():
            raise InvalidJob("deadline_s: already over: must be in the future")
        check_queue(waiting, self._limits.max_queued_jobs)
        prompts = job_prompts(self._runtime, self.documents, spec)
        with self._lock:
            size = sum(len(prompt) for prompt in prompts)
            held = sum(job.prompt_tokens for job in self._live.values())
            if held and held + size > _MAX_QUEUED_TOKENS:
                raise ServiceBusy(f"queue: unfinished jobs hold {held} prompt tokens", 30.0)
            record, is_new = self._store.create(
                spec, new_id("job"), spec.input.num_answers, self._runtime.reproducibility(spec.ask.sampling.seed),
                self._limits.max_queued_jobs, self._document_expires(),
            )  # fmt: skip
            if is_new:
                self._enqueue(record, prompts, {})
        return record

    def get(self, job_id: str) -> JobRecord:
        record = self._store.get(check_id(job_id, "job"))
        if record is None:
            raise JobNotFound(f"job {job_id}: not found (it may have expired)")
        return record

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[OutputToken]:
        """Return committed tokens with numbers above `after`, in order."""
        return self._store.tokens(job_id, after, limit)

    def progress(self, job_id: str) -> Mapping[int, PrefillProgress]:
        """Return the newest progress of each question, while the job runs."""
        job = self._live.get(job_id)
        return dict(job.progress) if job else {}

    def jobs(
        self, states: Sequence[JobState], labels: Mapping[str, str], limit: int, cursor: str
    ) -> tuple[Sequence[JobRecord], str]:
        """Return jobs, the newest first, and the cursor of the next page (empty at the end)."""
        return self._store.list_jobs(states, labels, limit, cursor)

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        """Return the job once it has ended, or as it is after `timeout_s`."""
        return self._subscriptions.wait(job_id, timeout_s)

    def stream(self, job_id: str, after: int = 0) -> Generator[JobEvent]:
        """Yield events from token `after + 1` on; ends with the record of the ended job.

        Tokens come in order, those together that are there together, progress in between (at least every 10 s), a
        record at every change of state. Closing the iterator of an attached job cancels the job.
        """
        record = self.get(job_id)
        if after > record.last_event:
            raise InvalidJob(f"after: {after}: must be between 0 and {record.last_event}, the newest token")
        return self._subscriptions.events(job_id, after, record.spec.attached)

    def cancel(self, job_id: str) -> JobRecord:
        """End a job and return it; one that has ended is returned unchanged."""
        record = self.get(job_id)
        if record.state.is_final:
            return record
        self._cancel(job_id)
        return self.wait(job_id, 30.0)

    def delete(self, job_id: str) -> None:
        """Forget an ended job (NotAllowedNow while it runs)."""
        if not self.get(job_id).state.is_final or not self._store.delete(job_id):
            raise NotAllowedNow(f"job {job_id}: still runs: cancel it first")
        self._subscriptions.notify([job_id])

    def counts(self) -> tuple[int, int]:
        """Return how many jobs wait and how many run."""
        return self._store.count(WAITING), self._store.count(ACTIVE - WAITING)

    def on_ended(self, callback: Callable[[JobRecord, dict[int, int]], None]) -> None:
        """Call with every job that ends, and its number of tokens by question (metrics)."""
        self._on_ended.append(callback)

    def status(self) -> Mapping[str, Any]:
        """Return the fields of ClusterStatusReply (protos/jobs/jobs.proto); `stages` is a list of mappings."""
        waiting, running = self.counts()
        uptime = self._clock() - self._started
        return self._runtime.status() | {"queued": waiting, "running": running, "uptime_s": uptime}

    # --- internals ---------------------------------------------------------------------------------------------------

    def _document_expires(self) -> float:
        """Return the expiry of a document used now."""
        return self._clock() + self._limits.document_ttl_s

    def _requeue(self, record: JobRecord) -> None:
        """Queue a job again after its last committed token; one that cannot be built any more fails."""
        try:
            if record.restarts >= _MAX_RESTARTS:
                raise InvalidJob(f"given up: the cluster was restarted {record.restarts} times under this job")
            prompts = job_prompts(self._runtime, self.documents, record.spec)
            if document_id := record.spec.input.document_id:
                self._store.touch_document(document_id, self._document_expires())
        except (InvalidJob, JobNotFound) as error:
            self._cancel(record.id, str(error))
            return
        with self._lock:
            job, current = self._live.get(record.id), self._store.get(record.id)
            if job is not None and job.handles:
                return  # it was submitted to the new pipeline already
            if job is not None and job.cancelled:
                self._store.transition(record.id, ACTIVE, JobState.CANCELLED)
            if current is None or current.state.is_final or (job is not None and job.cancelled):
                self._ended(record.id)
            else:
                self._enqueue(current, prompts, committed_tokens(self._store, record.id))

    def _reasoning_opened(self, spec: JobSpec) -> bool:
        return not self._runtime.ids_only and reasoning_opened(self._runtime.tokenizer, spec)

    def _enqueue(
        self, record: JobRecord, prompts: Sequence[array[int]], done: Mapping[int, Sequence[SampledToken]]
    ) -> None:
        """Hand a job's unfinished questions to the engine (lock held)."""
        before, spec = self._live.get(record.id), record.spec
        job = self._live[record.id] = LiveJob(
            record.id,
            spec.input.num_answers,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            deadline=spec.deadline,
            follow_by=self._clock() + _ATTACH_WITHIN_S if spec.attached else None,
            ended={a.question: FinishReason(a.finish_reason) for a in record.answers if a.finish_reason},
            generated=before.generated if before else {},
        )
        opened = self._reasoning_opened(spec)
        items = []
        for question, prompt in enumerate(prompts):
            if question not in job.ended:
                resume = tuple(done.get(question, ()))
                generation = GenerationSpec(prompt, spec.ask, opened, spec.priority, resume, question)
                items.append((generation, self._recorder.callback(job, question)))
        try:
            job.handles = self._runtime.engine.submit_all(items, record.last_event)
        except EngineError:  # `pipeline_restarted` submits the job again
            if self._supervisor.state is PipelineState.DOWN:
                self._cancel(record.id, self._supervisor.reason)

    def _cancel(self, job_id: str, failure: str = "") -> None:
        """Cancel a live job, or with `failure` let it fail with that error; its questions stop within a step."""
        with self._lock:
            handles: list[RequestHandle] = []
            if job := self._live.get(job_id):
                job.cancelled = True  # for `_requeue`, should the pipeline fail before the engine has ended it
                handles = job.handles
            if failure or not handles:
                end = JobState.FAILED if failure else JobState.CANCELLED
                self._store.transition(job_id, ACTIVE, end, error=failure)
            with contextlib.suppress(EngineError):
                for handle in handles:
                    self._runtime.engine.cancel(handle)
            if not handles:  # no engine will say that it has ended
                self._ended(job_id)
        self._subscriptions.notify([job_id])

    def _ended(self, job_id: str) -> None:
        with self._lock:
            job = self._live.pop(job_id, None)
        if job is None:
            return
        record = self._store.get(job_id)
        if record is not None:
            for callback in self._on_ended:
                callback(record, job.generated)

    # --- time --------------------------------------------------------------------------------------------------------

    def _watch_time(self) -> None:
        """Until `close`, end jobs that are out of time and, every minute, delete what has expired."""
        next_sweep = self._clock()
        while not self._closing.is_set():
            now = self._clock()
            try:
                self._end_overdue(now)
                if now >= next_sweep:
                    next_sweep = now + _SWEEP_EVERY_S
                    self._sweep(now)
            except Exception:  # noqa: BLE001 - one failed action must not end all later ones
                _log.exception("a timed action failed")
            self._closing.wait(_TICK_S)

    def _end_overdue(self, now: float) -> None:
        """Let jobs fail whose deadline is over, and cancel attached ones that nobody has begun to follow in time."""
        with self._lock:
            jobs = list(self._live.values())
        for job in jobs:
            if job.deadline is not None and job.deadline <= now:
                job.deadline = None  # once
                self._cancel(job.job_id, "deadline exceeded")
            elif job.follow_by is not None and job.follow_by <= now:
                job.follow_by = None
                if not self._subscriptions.is_followed(job.job_id):
                    self._cancel(job.job_id)

    def _sweep(self, now: float) -> None:
        self._store.expire(now, self._limits.result_ttl_s)
        self.documents.sweep(now)

    # --- callbacks of the supervisor ---------------------------------------------------------------------------------

    def pipeline_failed(self) -> None:
        """Commit what the failed pipeline has emitted, and show its jobs as recovering."""
        self._recorder.flush()
        if self._closing.is_set():
            return
        with self._lock:
            unfinished = list(self._live)
            for job in self._live.values():
                job.handles = []
        for job_id in unfinished:
            if not self._store.transition(job_id, ACTIVE, JobState.RECOVERING):
                self._ended(job_id)  # it had failed or was cancelled; no engine will end its questions
        self._subscriptions.notify(unfinished)

    def pipeline_restarted(self) -> None:
        """Queue every unfinished job again, after its last committed token."""
        for record in self._store.unfinished():
            if not self._closing.is_set():
                self._requeue(record)

    def pipeline_given_up(self, reason: str) -> None:
        """Let every unfinished job fail."""
        with self._lock:
            for job_id in list(self._live):
                self._cancel(job_id, reason)
