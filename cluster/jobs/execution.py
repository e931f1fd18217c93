"""The running of stored jobs: handed to the engine, recorded, resumed when pipeline or head were replaced, ended.

Every step about one job is taken for that job alone: whatever it raises ends this job with the reason, and no other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from cluster.common.errors import ClusterError, EngineError, JobStoreError
from cluster.common.steady_clock import SteadyClock
from cluster.common.text_format import describe_error, one_line
from cluster.config.schema import ServerSection
from cluster.engine.outputs import GenerationSpec, PrefillProgress
from cluster.engine.runtime import ClusterRuntime, longest
from cluster.engine.supervisor import PipelineState
from cluster.jobs.blame import Blame, Progress
from cluster.jobs.document.tokens import DocumentTokens
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import (
    ACTIVE,
    InvalidJob,
    JobError,
    JobRecord,
    JobSpec,
    JobState,
    ServiceBusy,
    check_id,
    job_not_found,
)
from cluster.jobs.prompts import clock_of, job_prompts, reasoning_opened
from cluster.jobs.recorder import LiveJob, Recorder, committed_tokens
from cluster.jobs.sqlite.batches import BatchTable
from cluster.jobs.store import JobStore
from cluster.jobs.store_retry import StoreAbandoned, StoreRetry, may_pass
from cluster.jobs.subscriptions import Subscriptions
from cluster.scheduler.prefix_keys import Private
from cluster.scheduler.request import FinishReason
from protos.errors import UserError
from protos.stage.messages import SampledToken

_log = logging.getLogger(__name__)
_MAX_REASON = 1000  # characters


class JobExecution:
    """Runs the jobs of a store on the pipeline of a runtime; the listener of its supervisor.

    All methods may be called from any thread.
    """

    def __init__(
        self, runtime: ClusterRuntime, store: JobStore, documents: DocumentStore, limits: ServerSection,
        clock: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            limits: `max_queued_jobs`, `result_ttl_s` and `document_ttl_s` bound what is kept.
            clock: gives seconds since 1970 that pass evenly; default: a `SteadyClock`.
        """
        self._runtime = runtime
        self._supervisor = runtime.supervisor
        self._store = store
        self.documents = documents
        self.batches: BatchTable = store
        self.document_tokens = DocumentTokens(runtime, documents)
        self._limits = limits
        self.now = clock or SteadyClock()
        self.store_problem = ""  # of the store as a whole; no job is taken and nothing written meanwhile
        self._subscriptions = Subscriptions(store, self.get, self.progress, self._decide_end)
        self._closing = threading.Event()
        self._retry = StoreRetry(self._closing, lambda: self.store_problem)
        self._recorder = Recorder(store, self._recorded, self._ended, self._fail, lambda: self.store_problem)
        self._lock = threading.RLock()  # live jobs, blame, ends
        self._live: dict[str, LiveJob] = {}
        self._blame = Blame()
        self._ends: dict[str, str] = {}  # jobs whose end is to be written: the error, or "" for cancelled
        self._recovering = False  # from the failure of a pipeline until all jobs are queued again
        self._on_ended: list[Callable[[JobRecord, dict[int, int]], None]] = []

    def get(self, job_id: str) -> JobRecord:
        record = self._store.get(check_id(job_id, "job"))
        if record is None:
            raise job_not_found(job_id)
        return record

    def progress(self, job_id: str) -> Mapping[int, PrefillProgress]:
        """Return the newest progress of each question, while the job runs."""
        job = self._live.get(job_id)
        return dict(job.progress) if job else {}

    # --- from the store to the engine --------------------------------------------------------------------------------

    def _document_expires(self) -> float:
        """Return the expiry of a document used now."""
        return self.now() + self._limits.document_ttl_s

    def _reasoning_opened(self, spec: JobSpec, question: int) -> bool:
        try:
            return reasoning_opened(self._runtime, spec, question)
        except Exception:  # noqa: BLE001 - it is about text that is stored already
            _log.exception("whether an answer begins with reasoning cannot be told")
            return False

    def _take_up(self, job_ids: Iterable[str]) -> None:
        """Queue jobs again, each after its last committed token; one that cannot go on fails with the reason."""
        for job_id in job_ids:
            if self._closing.is_set():
                return
            try:
                self._requeue(job_id)
            except (KeyboardInterrupt, StoreAbandoned):
                raise
            except BaseException as error:  # noqa: BLE001 - whatever is wrong with one job, others go on
                self._fail(job_id, error)

    def _requeue(self, job_id: str) -> None:
        job = self._live.get(job_id)
        if job_id in self._ends or (job is not None and job.handles):
            return  # it is about to end, or has been submitted to the new pipeline already
        record = self._retry(lambda: self._store.get(job_id))
        if record is None or record.state.is_final:
            self._ended(job_id)
            return
        if job is not None and job.cancelled:
            self._decide_end(job_id)
            return
        if record.damage:
            raise InvalidJob(record.damage)
        if job is not None and not self._may_run(job_id):
            return
        prompts = self._prompts_again(record)
        if document_id := record.spec.input.document_id:
            self._retry(lambda: self._store.touch_document(document_id, self._document_expires()))
        done = self._retry(lambda: committed_tokens(self._store, job_id))
        with self._lock:
            before = self._live.get(job_id)
            if before is None or not (before.handles or before.cancelled):
                self._enqueue(record, prompts, done)

    def _prompts_again(self, record: JobRecord) -> list[array[int]]:
        """Return the prompts of a job that was accepted, however long others keep what renders chat templates."""
        while True:
            try:
                return job_prompts(self._runtime, self.document_tokens, record.spec, clock_of(record))
            except ServiceBusy as error:
                if self._closing.wait(error.retry_after_s):
                    raise StoreAbandoned from error

    def _may_run(self, job_id: str) -> bool:
        with self._lock:
            running = [other.job_id for other in self._live.values() if other.handles]
            return self._blame.may_run(job_id, running)

    def _enqueue_new(self, record: JobRecord, prompts: Sequence[array[int]]) -> None:
        """Hand a job that has just been stored to the engine; one that it refuses leaves nothing (lock held)."""
        try:
            self._enqueue(record, prompts, {})
        except BaseException as error:
            self._live.pop(record.id, None)
            try:
                self._store.transition(record.id, ACTIVE, JobState.FAILED)
                self._store.delete(record.id)
            except JobStoreError:
                self._fail(record.id, error)
            raise

    def _enqueue(
        self, record: JobRecord, prompts: Sequence[array[int]], done: Mapping[int, Sequence[SampledToken]]
    ) -> None:
        """Hand a job's unfinished questions to the engine, unless it must wait for suspects (lock held)."""
        before, spec = self._live.get(record.id), record.spec
        may_run = self._may_run(record.id)
        job = self._live[record.id] = LiveJob(
            record.id,
            spec.input.num_answers,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            deadline=spec.deadline,
            attached_at=self.now() if spec.attached else None,
            ended={a.question: FinishReason(a.finish_reason) for a in record.answers if a.finish_reason},
            generated=before.generated if before else {},
        )
        if not may_run:
            return  # `_take_up_held` comes back to it
        ask = record.ask
        stored = record.reproducibility.get("scale_len", 0)  # what was in force when it was submitted
        scale_len = max(stored if isinstance(stored, int) else 0, longest(prompts))
        items = []
        family, private = self._of_document(record)
        for question, prompt in enumerate(prompts):
            if question not in job.ended:
                resume = tuple(done.get(question, ()))
                generation = GenerationSpec(
                    prompt, ask, spec.priority, resume, question, scale_len, spec.cache_salt,
                    family, spec.input.document_id, private, spec.prompt_logprobs, spec.cache_ttl_s,
                )  # fmt: skip
                items.append((generation, self._recorder.callback(job, question)))
        try:
            job.handles = self._runtime.engine.submit_all(items, record.last_event)
        except EngineError:  # `pipeline_restarted` submits the job again
            if self._supervisor.state is PipelineState.DOWN:
                self._decide_end(record.id, self._supervisor.reason)

    def _of_document(self, record: JobRecord) -> tuple[str, Private | None]:
        """Return the family of the kernels of a job's document, and where the job's own KV begins if that is shared."""
        name = record.spec.input.document_id
        document = self._store.get_document(name) if name else None
        if document is None:
            return "", None
        is_ours = not document.shared or self._runtime.deployment.config.prefill.share_across_keys
        end = self.document_tokens.head_tokens() + document.tokens
        return document.kernel_family, None if is_ours else Private(end, record.owner)

    def _take_up_held(self) -> None:
        """Queue one job again that no engine has although a pipeline runs: it had to wait for a suspect."""
        if self._recovering or self._supervisor.running is None:
            return
        with self._lock:
            waiting = [job_id for job_id, job in self._live.items() if not job.handles and not job.cancelled]
        for job_id in self._blame.order(waiting):
            if job_id not in self._ends and self._may_run(job_id):
                with contextlib.suppress(StoreAbandoned):
                    self._take_up([job_id])
                return

    # --- ends --------------------------------------------------------------------------------------------------------

    def _fail(self, job_id: str, error: BaseException | str) -> None:
        """Let a job fail that cannot go on, with the reason."""
        if isinstance(error, str):
            reason = error
        elif isinstance(error, (JobError, UserError, ClusterError)):
            reason = one_line(error)
        else:
            _log.error("job %s cannot go on", job_id, exc_info=error)
            reason = f"cannot go on: {describe_error(error)}"
        self._decide_end(job_id, reason[:_MAX_REASON].encode(errors="backslashreplace").decode() or "failed")

    def _decide_end(self, job_id: str, failure: str = "") -> None:
        """Cancel a live job, or with `failure` let it fail with that error, as soon as the store takes it."""
        with self._lock:
            self._ends.setdefault(job_id, failure)
        self._write_ends()

    def _write_ends(self) -> None:
        """End the jobs whose end is decided; what the store refuses is tried again later, by the timer."""
        for job_id, failure in list(self._ends.items()):
            try:
                self._cancel(job_id, failure)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one job, others end
                _log.error("job %s cannot be ended now: %s", job_id, one_line(error))
                if may_pass(error):
                    return
            else:
                self._ends.pop(job_id, None)

    def _cancel(self, job_id: str, failure: str = "") -> None:
        """Cancel a live job, or with `failure` let it fail with that error; its questions stop within a step."""
        with self._lock:
            job = self._live.get(job_id)
            handles = list(job.handles) if job is not None else []
            will_tell = bool(handles) and not (job is not None and job.broken)  # the engine, that it has ended
            if job is not None and not failure:
                job.cancelled = True  # for `_requeue`, should the pipeline fail before the engine has ended it
        if failure or not will_tell:
            self._store.transition(job_id, ACTIVE, JobState.FAILED if failure else JobState.CANCELLED, error=failure)
        with contextlib.suppress(EngineError):
            for handle in handles:
                self._runtime.engine.cancel(handle)
        if not will_tell:
            self._ended(job_id)
        self._subscriptions.notify([job_id])

    def _ended(self, job_id: str) -> None:
        with self._lock:
            job = self._live.pop(job_id, None)
            self._ends.pop(job_id, None)
            self._blame.forget(job_id)
        if job is None:
            return
        try:
            if (record := self._store.get(job_id)) is not None:
                for callback in self._on_ended:
                    callback(record, job.generated)
        except Exception:  # noqa: BLE001 - figures about one job must not end others
            _log.exception("job %s: its end cannot be counted", job_id)

    def _recorded(self, job_ids: Sequence[str]) -> None:
        """Notice what was committed: wake subscribers, clear suspects that have come further."""
        with self._lock:
            for job_id in job_ids:
                if job := self._live.get(job_id):
                    self._blame.note_progress(job_id, job.reached)
        self._subscriptions.notify(job_ids)

    # --- callbacks of the supervisor ---------------------------------------------------------------------------------

    def pipeline_failed(self) -> None:
        """Commit what the failed pipeline has emitted, and show its jobs as recovering."""
        self._recovering = True
        self._recorder.flush()
        if self._closing.is_set():
            return
        with self._lock:
            jobs = list(self._live.values())
            guilty = self._blame.note_failure(self._suspects(jobs))
            for job in jobs:
                job.handles = []
        if guilty:
            times = self._blame.failures(guilty)
            self._fail(guilty, f"given up: the pipeline failed {times} times in a row under this job, at last alone")
        with contextlib.suppress(StoreAbandoned):
            self._show_recovering([job.job_id for job in jobs])

    def _suspects(self, jobs: Iterable[LiveJob]) -> dict[str, Progress]:
        """Return the jobs that may be the reason of the failure, and how far they had come."""
        newest = self._supervisor.newest
        sequences = newest.engine.suspects if newest is not None else frozenset()
        return {
            job.job_id: job.reached
            for job in jobs
            if any(handle.request.sequence in sequences for handle in job.handles)
        }

    def _show_recovering(self, job_ids: Sequence[str]) -> None:
        """Change the state of unfinished jobs in one transaction, or one by one if one of them cannot be changed."""
        changes = [(job_id, ACTIVE, JobState.RECOVERING) for job_id in job_ids]
        try:
            self._retry(lambda: self._store.commit_step([], changes, []))
        except (KeyboardInterrupt, StoreAbandoned):
            raise
        except BaseException:  # noqa: BLE001 - whatever is wrong with one job, others go on
            _log.exception("jobs cannot be shown as recovering together")
            for job_id in job_ids:
                try:
                    self._retry(partial(self._store.transition, job_id, ACTIVE, JobState.RECOVERING))
                except (KeyboardInterrupt, StoreAbandoned):
                    raise
                except BaseException as error:  # noqa: BLE001 - as above
                    self._fail(job_id, error)
        self._subscriptions.notify(job_ids)

    def pipeline_restarted(self) -> None:
        """Queue every unfinished job again, after its last committed token."""
        try:
            unfinished = self._retry(self._store.unfinished_ids)
            with self._lock:
                live = list(self._live)  # with those that have ended and that no engine will end
            self._take_up(self._blame.order(dict.fromkeys([*unfinished, *live])))
        except StoreAbandoned as error:
            _log.warning("%s", error)
        finally:
            self._recovering = False

    def pipeline_given_up(self, reason: str) -> None:
        """Let every unfinished job fail."""
        with self._lock:
            self._ends.update(dict.fromkeys(self._live, reason))
        self._recovering = False
        self._write_ends()
