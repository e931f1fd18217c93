"""The job service: validates, stores, queues and resumes jobs.

Failure contract: a job is durable once `submit` has returned, a token before anybody sees it. When the pipeline fails,
its supervisor replaces it, and unfinished jobs go on after their last committed token; when the head process dies, the
next one does the same. Whatever is wrong with one job ends that job with the reason, and no other; while the store is
locked or full, all wait for it. Cancelling, waiting and reading are idempotent; submitting is, with an idempotency key.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from cluster.common.errors import EngineError, JobStoreError
from cluster.common.text_format import describe_error, one_line
from cluster.common.watched_thread import Watched, WatchedThread
from cluster.config.schema import ServerSection
from cluster.engine.outputs import OutputToken
from cluster.engine.runtime import ClusterRuntime, longest
from cluster.engine.supervisor import PipelineState
from cluster.jobs.document.kv import DocumentKv
from cluster.jobs.document.preload import DocumentPreload
from cluster.jobs.document.tokens import DocumentCounter
from cluster.jobs.document.transfer import DocumentTransfer
from cluster.jobs.documents import DocumentStore
from cluster.jobs.execution import JobExecution
from cluster.jobs.model import (
    ACTIVE,
    SCALE_TO_COME,
    WAITING,
    DocumentRecord,
    InvalidJob,
    JobRecord,
    JobSpec,
    JobState,
    NotAllowedNow,
    NotReady,
    ServiceBusy,
    new_id,
)
from cluster.jobs.prompts import (
    BUILD_WAIT_S,
    check_text,
    constrain_calls,
    count_text,
    document_ids,
    has_length_scale,
    job_prompts,
    stored_clock,
)
from cluster.jobs.store import JobStore
from cluster.jobs.subscriptions import JobEvent
from cluster.jobs.tenants.tenant import ANYONE, Tenant, cache_salt, kv_owner_of
from protos.model.grid import last_cut

_log = logging.getLogger(__name__)
_TICK_S = 0.25  # how late a job may be noticed that is out of time
_ATTACH_WITHIN_S = 60.0  # an attached job that nobody follows for this long is cancelled
_COUNT_AT_START = 100  # documents
_SWEEP_EVERY_S = 60.0  # how often expired jobs and documents are deleted
_END_EVERY_S = 2.0  # how often ends are tried again that the store has refused
_MAX_QUEUED_TOKENS = 1 << 26  # prompt tokens of unfinished jobs; 4 bytes each


class JobService(JobExecution):
    """Runs jobs on a cluster runtime, with a store and a folder of documents.

    Methods raise the errors of `cluster.jobs.model`; all may be called from any thread.
    """

    def __init__(
        self, runtime: ClusterRuntime, store: JobStore, documents: DocumentStore, limits: ServerSection,
        clock: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """Args: as of `JobExecution`."""
        super().__init__(runtime, store, documents, limits, clock)
        self.problem = ""  # why the head does not serve as it should, for `status`
        self.http_url = ""  # where clients reach it over HTTP, for `status`
        self._timer = WatchedThread(self._watch_time, "timer", self._closing)
        self._counter = DocumentCounter(partial(document_ids, runtime, self.document_tokens, wait_s=None))
        self.document_kv = DocumentKv(store, runtime.kv_store, self._keep_pages)
        self._transfer = DocumentTransfer(runtime, documents, self.document_tokens, self.document_kv)
        self._preload = DocumentPreload(runtime, documents, self.document_tokens, self.stored_kv)
        self._draining = False  # no job is taken any more
        self._started = self.now()

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def threads(self) -> list[Watched]:
        """The threads without which jobs do not go on."""
        supervisor = self._supervisor.thread
        own: list[Watched] = [self._recorder.thread, self._timer, self._counter.thread, self._preload.thread]
        return own if supervisor is None else [*own, supervisor]

    def start(self) -> None:
        """Resume what an earlier head process left unfinished, and begin to work. The runtime must be running."""
        self._store.split_old_tokens(self._reasoning_opened)
        self._runtime.kv_store.events = self.document_kv
        self.documents.on_deleted = self._forget_kv
        self._recorder.start()
        unfinished = self._retry(self._store.unfinished_ids)
        self._show_recovering(unfinished)
        self._take_up(unfinished)
        if not self._runtime.ids_only:
            self._counter.start(self._store.uncounted_documents(_COUNT_AT_START))
        self._timer.start()
        self._supervisor.supervise(self)
        self._preload.start()

    @property
    def is_draining(self) -> bool:
        """Whether no job is taken any more."""
        return self._draining

    def drain(self, timeout_s: float) -> None:
        """Refuse new jobs and wait for the running ones; the next head process continues what is left."""
        self._draining = True
        until = time.monotonic() + timeout_s
        while self._live and time.monotonic() < until:
            time.sleep(0.1)

    def close(self) -> None:
        """Stop without touching the state of unfinished jobs; may be called twice."""
        self._draining = True
        self._closing.set()
        self._store.stop_waiting()  # for another process that has locked the database
        self._timer.join()
        self._counter.close()
        self._preload.close()
        self._recorder.close()  # before the supervision ends: that waits for what is being recorded
        self._supervisor.release()  # the pipeline must not be started again while its owner closes it
        self._subscriptions.close()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec, tenant: Tenant = ANYONE) -> JobRecord:
        """Validate, store and queue. Raises InvalidJob, JobNotFound (document), JobConflict, ServiceBusy, NotReady.

        Args: `tenant` owns the job. Whether it sees the document is for `TenantService` to say.
        """
        if self.store_problem:
            raise JobStoreError(self.store_problem)
        spec = constrain_calls(self._runtime, spec)
        known = self._store.admit(spec, self._limits.max_queued_jobs, tenant)
        if known is not None:  # a repeated submission is answered whatever goes on
            return known
        if self._draining:
            raise NotReady("the head is shutting down: submit again in a moment", 5.0)
        if reason := self.check_pipeline():
            raise NotReady(reason, 5.0)
        if spec.deadline is not None and spec.deadline <= self.now():
            raise InvalidJob("deadline_s: already over: must be in the future")
        now = datetime.fromtimestamp(self.now())
        spec, prompts = self._build(spec, now)
        document = self.documents.get(spec.input.document_id) if spec.input.document_id else None
        shares = self._runtime.deployment.config.prefill.share_across_keys
        kv_owner = "" if shares else tenant.name if document is None else kv_owner_of(document)
        spec = replace(spec, cache_salt=cache_salt(kv_owner, spec.cache_salt))
        of_document = (max(0, document.scale_len), document.kernel_family) if document is not None else (0, "")
        with self._lock:
            size = sum(len(prompt) for prompt in prompts)
            held = sum(job.prompt_tokens for job in self._live.values())
            if held and held + size > _MAX_QUEUED_TOKENS:
                raise ServiceBusy(f"queue: unfinished jobs leave no room for {size} prompt tokens: wait", 30.0)
            record, is_new = self._store.create(
                spec, new_id("job"), spec.input.num_answers,
                {**self._runtime.reproducibility(spec.ask, prompts, *of_document), **stored_clock(now)},
                self._limits.max_queued_jobs, self._document_expires(), tenant,
            )  # fmt: skip
            if is_new:
                self._enqueue_new(record, prompts)
        return record

    def _build(self, spec: JobSpec, now: datetime) -> tuple[JobSpec, list[array[int]]]:
        """Return the prompts of a submission, and the submission with as long an answer as it gets."""
        least = replace(spec, ask=spec.ask.shortened(1)) if spec.shorten else spec
        prompts = job_prompts(self._runtime, self.document_tokens, least, now, BUILD_WAIT_S)
        if spec.shorten:
            room = self._runtime.max_model_len - longest(prompts)
            spec = replace(spec, ask=spec.ask.shortened(room))
        return spec, prompts

    def keep_text(self, text: str, max_bytes: int, tenant: Tenant = ANYONE) -> AbstractContextManager[DocumentRecord]:
        """Store the document that a submission brings, for a block; it is kept unless the block raises.

        Raises InvalidJob, before anything is stored, when it cannot fit the model.
        """
        content = text.encode()
        if len(content) <= max_bytes:  # else `provisional` refuses it
            check_text(self._runtime, len(content))
        return self.documents.provisional("", [content], max_bytes, tenant)

    def add_document(
        self, name: str, pieces: Iterable[bytes], max_bytes: int, *, max_tokens: int = 0, pinned: bool = False,
        source_hash: str = "", append_to: str = "", tenant: Tenant = ANYONE, shared: bool = False,
    ) -> DocumentRecord:  # fmt: skip
        """Store a document with the length scale that its jobs use, and let it be tokenised.

        Args:
            max_tokens: length that it may grow to; 0: see `default_scale_len`.

        Raises as `DocumentStore.put`.
        """
        if max_tokens > self._runtime.max_model_len:
            limit = self._runtime.max_model_len
            raise InvalidJob(f"max_tokens: {max_tokens}: must be at most {limit}, max_model_len")
        if append_to and max_tokens:
            raise InvalidJob(
                f"max_tokens: {max_tokens}: must be 0: what is appended has the scale of what comes before"
            )
        if append_to and self.documents.get(append_to).scale_len == SCALE_TO_COME:
            self.count_document(append_to)
        scale_len = (max_tokens or SCALE_TO_COME) if has_length_scale(self._runtime) else 0
        record = self.documents.put(
            name, pieces, max_bytes, scale_len=scale_len, pinned=pinned, source_hash=source_hash, append_to=append_to,
            tenant=tenant, shared=shared,
        )  # fmt: skip
        self._count_later(record)
        return record

    def export_document(self, document_id: str, with_kv: bool) -> Iterator[bytes]:
        """Return a document as an archive, in pieces. Raises as `DocumentTransfer.export`."""
        return self._transfer.export(document_id, with_kv)

    def import_document(self, pieces: Iterable[bytes], max_bytes: int, tenant: Tenant = ANYONE) -> DocumentRecord:
        """Store the document of an archive. Raises as `DocumentTransfer.take_in`."""
        record = self._transfer.take_in(pieces, max_bytes, tenant)
        self._count_later(record)
        self._preload.add(record.id)
        return record

    def _count_later(self, record: DocumentRecord) -> None:
        if (not record.tokens or record.scale_len == SCALE_TO_COME) and not self._runtime.ids_only:
            self._counter.add(record.id)

    def count_document(self, document_id: str) -> int:
        """Return how many tokens a document has, which are kept. Raises InvalidJob, ServiceBusy, JobNotFound."""
        return len(document_ids(self._runtime, self.document_tokens, document_id))

    def count_text(self, content: bytes) -> int:
        """Return how many tokens a text has as a document, without storing it. Raises InvalidJob, ServiceBusy."""
        return count_text(self._runtime, self.document_tokens, content)

    def stored_kv(self, records: Sequence[DocumentRecord]) -> Mapping[str, tuple[int, int]]:
        """Return, by document, how many of its first tokens have stored KV that any question about it can use, and the
        bytes of all its KV, with that of its questions; without those that have none.
        """
        block, spec = self._runtime.kv_store.block_tokens, self._runtime.deployment.spec
        sizes = self.document_kv.sizes({record.id: max(0, record.scale_len) for record in records})
        head = self.document_tokens.head_tokens() if sizes else 0
        found: dict[str, tuple[int, int]] = {}
        for record in records:
            if (blocks_and_size := sizes.get(record.id)) is not None:
                blocks, size = blocks_and_size
                end = head + record.tokens  # what is stored beyond depends on the question
                shared = last_cut(spec, end, max(end + 1, record.scale_len)) // block * block
                found[record.id] = max(0, min(blocks * block, shared) - head), size
        return found

    def pipeline_restarted(self) -> None:
        """Queue every unfinished job again; pages that stayed in memory may be of documents deleted meanwhile."""
        with suppress(JobStoreError):  # the next sweep does it
            self.document_kv.sweep_memory()
        super().pipeline_restarted()

    def _keep_pages(self, read_living: Callable[[], Collection[str]]) -> None:
        with suppress(EngineError):  # without a pipeline: see `pipeline_restarted`
            self._runtime.engine.keep_documents(read_living)

    def _forget_kv(self) -> None:
        try:
            self.document_kv.sweep()
        except JobStoreError as error:
            _log.warning("stored KV of deleted documents stays until the next sweep: %s", one_line(error))

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[OutputToken]:
        """Return committed tokens with numbers above `after`, in order."""
        return self._store.tokens(job_id, after, limit)

    def jobs(
        self, states: Sequence[JobState], labels: Mapping[str, str], limit: int, cursor: str, owner: str | None = None
    ) -> tuple[Sequence[JobRecord], str]:
        """Return jobs of an owner or (None) all, the newest first, and the cursor of the next page ("" at the end)."""
        return self._store.list_jobs(states, labels, limit, cursor, owner)

    def owner(self, job_id: str) -> str | None:
        """Return whose a job is; None for an unknown one."""
        return self._store.owner(job_id)

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
        self._decide_end(job_id)
        return self.wait(job_id, 30.0)

    def delete(self, job_id: str) -> None:
        """Forget an ended job (NotAllowedNow while it runs)."""
        if not self.get(job_id).state.is_final or not self._store.delete(job_id):
            raise NotAllowedNow(f"job {job_id}: still runs: cancel it first")
        self._subscriptions.notify([job_id])

    def counts(self, owner: str | None = None) -> tuple[int, int]:
        """Return how many jobs, of an owner or (None) of all, wait and how many run."""
        return self._store.count(WAITING, owner), self._store.count(ACTIVE - WAITING, owner)

    def on_ended(self, callback: Callable[[JobRecord, dict[int, int]], None]) -> None:
        """Call with every job that ends, and its number of tokens by question (metrics)."""
        self._on_ended.append(callback)

    def status(self) -> Mapping[str, Any]:
        """Return the fields of ClusterStatusReply (protos/jobs/jobs.proto); `stages` is a list of mappings."""
        try:
            waiting, running = self.counts()
        except JobStoreError:  # `problem` says it
            waiting, running = 0, len(self._live)
        own = {
            "queued": waiting, "running": running, "uptime_s": self.now() - self._started, "problem": self.problem,
            "http_url": self.http_url,
        }  # fmt: skip
        return self._runtime.status() | own

    def check_pipeline(self) -> str:
        """Return why no pipeline will run again, or ""."""
        is_down = self._supervisor.state is PipelineState.DOWN
        return f"the pipeline is down and the head must be restarted: {self._supervisor.reason}" if is_down else ""

    def check_store(self) -> str:
        """Look whether the store as a whole can be used; return what is wrong, or ""."""
        try:
            self._store.check()
            self.store_problem = ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the store cannot be used
            self.store_problem = one_line(error) or describe_error(error)
        return self.store_problem

    # --- time --------------------------------------------------------------------------------------------------------

    def _watch_time(self) -> None:
        """Until `close`: end jobs that are out of time, take up jobs that had to wait, delete what has expired."""
        next_sweep = next_end = self.now()
        while not self._closing.is_set():
            now = self.now()
            self._end_overdue(now)
            self._take_up_held()
            if now >= next_end:
                next_end = now + _END_EVERY_S
                self._write_ends()
            if now >= next_sweep:
                next_sweep = now + _SWEEP_EVERY_S
                self._sweep(now)
            self._closing.wait(_TICK_S)

    def _end_overdue(self, now: float) -> None:
        """Let jobs fail whose deadline is over, and cancel attached ones that nobody has begun to follow in time."""
        with self._lock:
            jobs = list(self._live.values())
        for job in jobs:
            if job.deadline is not None and job.deadline <= now:
                job.deadline = None  # once
                self._decide_end(job.job_id, "deadline exceeded")
            elif job.attached_at is not None and job.attached_at + _ATTACH_WITHIN_S <= now:
                job.attached_at = None
                if not self._subscriptions.is_followed(job.job_id):
                    self._decide_end(job.job_id)

    def _sweep(self, now: float) -> None:
        for sweep in (
            partial(self._store.expire, now, self._limits.result_ttl_s),
            partial(self.documents.sweep, now),
            self.document_kv.sweep,
        ):
            try:
                sweep()
            except Exception:  # noqa: BLE001 - the next sweep tries again
                _log.exception("a timed action failed: what has expired stays for now")
