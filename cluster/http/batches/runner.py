"""Works on batches: reads their input, has few lines at a time answered by jobs of low priority, writes their output.

Failure contract: what a batch has come to is in the store. The job of a line has an idempotency key of batch and line,
so the next head finds the job that an earlier one has made; a result is stored once; output files are written from the
stored results in the order of the lines, so writing one again gives the same file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from cluster.access.keys import Keys
from cluster.common.errors import JobStoreError
from cluster.common.text_format import one_line
from cluster.common.watched_thread import WatchedThread
from cluster.http.batches.endpoints import ENDPOINTS, EndedJob, Endpoint
from cluster.http.batches.lines import MAX_LINES, RequestLine, answered, not_answered, read_lines
from cluster.http.core.backend import Backend
from cluster.http.core.body import parse
from cluster.http.core.errors import to_api_error
from cluster.http.files.files import BATCH_OUTPUT
from cluster.http.options import RequestModel
from cluster.jobs.model import ACTIVE, InvalidJob, JobError, JobNotFound, JobRecord, JobSpec, JobState
from cluster.jobs.sqlite.batches import BatchLine, BatchRecord, BatchStatus
from cluster.jobs.tenants.service import TenantService
from cluster.jobs.tenants.tenant import ANYONE, Tenant

if TYPE_CHECKING:
    from cluster.jobs.service import JobService

PRIORITY = -1  # of the jobs of lines, at most: they wait for all others
LABEL = "batch"
_LOOK_EVERY_S = 5.0  # for ends of time, and for what could not be done before
_FORGET_EVERY_S = 60.0
_CHECK_EVERY_S = 30.0  # whether jobs have ended of which nobody told
_PAGE = 500  # lines
_MAX_PROBLEMS = 100  # of an input file without any request, in the description of its batch
_log = logging.getLogger(__name__)
_Key = tuple[str, int]  # batch and line


@dataclass
class _ActiveLine:
    """A line whose jobs run.

    Attributes:
        owner: the service as who made the batch sees it.
    """

    owner: TenantService
    line: BatchLine
    endpoint: Endpoint
    asked: RequestModel
    jobs: list[str]
    pending: set[str]


class BatchRunner:
    """Works on all batches of a job service, from `start` to `close`."""

    def __init__(self, backend: Backend, service: JobService, keys: Keys | None = None) -> None:
        """
        Args:
            service: knows no callers; what is done for a batch is done as its owner.
            keys: with the limits of owners; None: there are none.
        """
        self._backend = backend
        self._service = service
        self._keys = keys
        self._table = service.batches
        self._changed = backend.batches_changed
        self._closing = threading.Event()
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()  # jobs
        self._active: dict[_Key, _ActiveLine] = {}
        self._lines: dict[str, _Key] = {}  # of active lines, by their jobs
        self._begun: Counter[str] = Counter()  # the newest line of each batch for which jobs were made
        self._retry_at: dict[str, float] = {}  # when the service may have room for a batch
        self._check_at = self._forget_at = 0.0
        self.thread = WatchedThread(self._run, "batch", self._closing)
        service.on_ended(lambda record, tokens: self._note_end(record))

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Stop without touching what batches have come to."""
        self._closing.set()
        self._changed.set()
        self.thread.join()

    def _note_end(self, record: JobRecord) -> None:
        if LABEL in record.spec.labels:
            self._ended.put(record.id)
            self._changed.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._changed.clear()
            try:
                self.look()
            except (JobStoreError, JobError) as error:  # the store cannot be used now
                _log.warning("batches wait: %s", one_line(error))
            except Exception:  # noqa: BLE001 - whatever is wrong with batches, the head goes on
                _log.exception("batches cannot go on now")
            self._changed.wait(_LOOK_EVERY_S)

    def look(self) -> None:
        """Do what can be done now."""
        now = self._service.now()
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._table.expire_batches(now - self._backend.limits.result_ttl_s)
        if now >= self._check_at:
            self._check_at = now + _CHECK_EVERY_S
            for job_id in self._lines:
                self._ended.put(job_id)
        self._collect()
        for batch in self._table.unfinished_batches():
            if self._closing.is_set():
                return
            try:
                self._advance(batch, now)
            except (JobStoreError, JobError) as error:
                _log.warning("%s waits: %s", batch.id, one_line(error))
            except Exception:  # noqa: BLE001 - whatever is wrong with one batch, others go on
                _log.exception("%s cannot go on now", batch.id)
        self._fill(now)

    def _advance(self, batch: BatchRecord, now: float) -> None:
        if batch.status is BatchStatus.VALIDATING:
            self._begin(batch)
        elif batch.status is BatchStatus.CANCELLING:
            self._break_off(batch, BatchStatus.CANCELLED, "the batch was cancelled")
        elif batch.status is BatchStatus.IN_PROGRESS and now >= batch.expires:
            self._break_off(batch, BatchStatus.EXPIRED, f"not answered within {batch.completion_window}")
        elif batch.status is BatchStatus.FINALIZING or (
            batch.status is BatchStatus.IN_PROGRESS
            and not self._table.open_lines(batch.id, 0, 1)
            and self._table.move_batch(batch.id, [BatchStatus.IN_PROGRESS], BatchStatus.FINALIZING)
        ):
            self._end(batch, BatchStatus.FINALIZING, BatchStatus.COMPLETED)

    # --- from the input file to jobs ---------------------------------------------------------------------------------

    def _begin(self, batch: BatchRecord) -> None:
        """Read the input file: its lines are stored, or the batch fails because it cannot be used."""
        try:
            if batch.endpoint not in ENDPOINTS:  # of another version
                raise InvalidJob(f"endpoint: {batch.endpoint}: must be one of {', '.join(ENDPOINTS)}")
            content = self._service.documents.read(batch.input)
            lines = [*islice(read_lines(content, batch.endpoint, batch.id), MAX_LINES + 1)]
        except JobError as error:
            self._table.fail_batch(batch.id, [_problem("invalid_input_file", str(error))])
            return
        if len(lines) > MAX_LINES:
            message = f"more than {MAX_LINES} requests: must be at most {MAX_LINES}: make several files"
            self._table.fail_batch(batch.id, [_problem("too_many_requests", message)])
        elif all(line.status for line in lines):
            found = [_problem_of(line) for line in lines[:_MAX_PROBLEMS]]
            self._table.fail_batch(batch.id, found or [_problem("empty_file", "the input file has no requests")])
        elif self._table.add_lines(batch.id, lines):
            _log.info("%s has %d requests", batch.id, len(lines))

    def _fill(self, now: float) -> None:
        """Make jobs of the next lines, as many as may run, in turn for all batches whose owners have a key."""
        batches = [
            one
            for one in self._table.unfinished_batches()
            if one.status is BatchStatus.IN_PROGRESS and now >= self._retry_at.get(one.id, 0.0)
        ]
        while batches and len(self._active) < self._backend.limits.max_batch_jobs:
            if self._closing.is_set() or self._service.is_draining:
                return
            running = Counter(batch_id for batch_id, _ in self._active)
            batch = min(batches, key=lambda one: running[one.id])
            lines, owner = self._table.open_lines(batch.id, self._begun[batch.id], 1), self._owner(batch)
            if not lines or owner is None or not self._make_jobs(batch, owner, lines[0], now):
                batches.remove(batch)

    def _owner(self, batch: BatchRecord) -> Tenant | None:
        """Return as whom the lines of a batch are submitted, with the limits of now; None: its keys are revoked."""
        if not batch.owner:
            return ANYONE
        return self._keys.named(batch.owner) if self._keys is not None else Tenant(batch.owner)

    def _make_jobs(self, batch: BatchRecord, tenant: Tenant, line: BatchLine, now: float) -> bool:
        """Make the jobs of a line, or find them if they were made; False if there is no room: it is tried again."""
        endpoint, asked = ENDPOINTS[batch.endpoint], None
        try:
            asked = parse(endpoint.model, self._body(batch, line)).model_copy(update={"stream": False})
            owner = TenantService(self._service, tenant)
            specs = endpoint.specs(self._backend, asked, owner)
            records = [owner.submit(_of_line(spec, batch, line, index)) for index, spec in enumerate(specs)]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer to this line
            shown = endpoint.error(error, asked)
            if shown.status in (429, 503):
                self._retry_at[batch.id] = now + (shown.retry_after_s or _LOOK_EVERY_S)
                return False
            self._answer(batch.id, line, shown.status, "", shown.body)
        else:
            ids = [record.id for record in records]
            self._active[batch.id, line.line] = _ActiveLine(owner, line, endpoint, asked, ids, set(ids))
            self._lines |= dict.fromkeys(ids, (batch.id, line.line))
            for record in records:
                if record.state.is_final:  # made by an earlier head
                    self._ended.put(record.id)
                    self._changed.set()
        self._begun[batch.id] = line.line
        return True

    def _body(self, batch: BatchRecord, line: BatchLine) -> bytes:
        """Return the body of a request. Raises JobNotFound, ApiError."""
        try:
            with self._service.documents.path(batch.input).open("rb") as file:
                file.seek(line.start)
                text = file.read(line.size)
        except FileNotFoundError as error:
            raise JobNotFound(f"document: {batch.input}: its file is gone: upload it again") from error
        return json.dumps(parse(RequestLine, text).body).encode()

    # --- from jobs to results ----------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Store the results of lines whose jobs have ended."""
        for _ in range(self._ended.qsize()):
            job_id = self._ended.get()
            key = self._lines.get(job_id)
            active = self._active.get(key) if key is not None else None
            if key is None or active is None or not self._has_ended(job_id):
                continue
            active.pending.discard(job_id)
            if not active.pending:
                try:
                    self._store_answer(key, active)
                except BaseException:
                    self._ended.put(job_id)
                    raise
                self._forget(key)

    def _forget(self, key: _Key) -> None:
        """Let go of a line, whose jobs have ended."""
        for job_id in self._active.pop(key).jobs:
            self._lines.pop(job_id, None)

    def _has_ended(self, job_id: str) -> bool:
        try:
            return self._service.get(job_id).state.is_final
        except JobNotFound:  # deleted by somebody: its line has an error
            return True

    def _is_cancelled(self, job_id: str) -> bool:
        try:
            return self._service.get(job_id).state is JobState.CANCELLED
        except JobNotFound:
            return False

    def _store_answer(self, key: _Key, active: _ActiveLine) -> None:
        batch_id, endpoint, asked = key[0], active.endpoint, active.asked
        try:
            jobs = [EndedJob(active.owner, active.owner.get(job_id)) for job_id in active.jobs]
            status, body = 200, asyncio.run(_body_of(endpoint, self._backend, asked, jobs))
        except JobStoreError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer to this line
            shown = to_api_error(error)
            status, body = shown.status, shown.body
        self._answer(batch_id, active.line, status, active.jobs[0], body)

    def _answer(self, batch_id: str, line: BatchLine, status: int, request_id: str, body: object) -> None:
        self._table.answer_line(batch_id, line.line, status, answered(batch_id, line, status, request_id, body))
        self._changed.set()

    # --- ends --------------------------------------------------------------------------------------------------------

    def _break_off(self, batch: BatchRecord, end: BatchStatus, reason: str) -> None:
        """End a batch before its time: its jobs are cancelled, and lines without an answer say why."""
        while running := self._service.jobs([*ACTIVE], {LABEL: batch.id}, _PAGE, "")[0]:
            for record in running:
                if self._closing.is_set():
                    return  # the service may have ended before its jobs: the next head does it
                self._service.cancel(record.id)
        for key, active in [*self._active.items()]:
            if key[0] == batch.id and any(self._is_cancelled(job_id) for job_id in active.jobs):
                self._forget(key)
            elif key[0] == batch.id:
                for job_id in active.jobs:
                    self._ended.put(job_id)
        self._collect()
        code = f"batch_{end.value}"
        self._table.close_lines(batch.id, lambda line: not_answered(batch.id, line, code, reason), 410)
        self._end(batch, batch.status, end)

    def _end(self, batch: BatchRecord, status: BatchStatus, end: BatchStatus) -> None:
        """Write the output files and end a batch."""
        output, errors = self._write(batch, True), self._write(batch, False)
        if self._table.end_batch(batch.id, status, end, output, errors):
            self._begun.pop(batch.id, None)
            self._retry_at.pop(batch.id, None)
            _log.info("%s %s", batch.id, end.value)

    def _write(self, batch: BatchRecord, is_good: bool) -> str:
        """Return the id of the file with the good or the bad results, "" where there are none."""
        pieces = self._results(batch, is_good)
        first = next(pieces, None)
        if first is None:
            return ""
        name = f"{batch.id}_{'output' if is_good else 'error'}.jsonl"
        most = self._backend.limits.max_documents_bytes
        owner = Tenant(batch.owner)  # whatever its limits: these are answers to what was let in
        return self._service.documents.put(name, chain([first], pieces), most, purpose=BATCH_OUTPUT, tenant=owner).id

    def _results(self, batch: BatchRecord, is_good: bool) -> Iterator[bytes]:
        after = 0
        while lines := self._table.results(batch.id, is_good, after, _PAGE):
            after = lines[-1].line
            yield "".join(f"{line.result}\n" for line in lines).encode()


def _of_line(spec: JobSpec, batch: BatchRecord, line: BatchLine, index: int) -> JobSpec:
    """Return the job of a line: durable, behind all others, and the same one whenever it is made."""
    labels = {**spec.labels, LABEL: batch.id, "custom_id": line.custom_id}
    key = f"{batch.id}:{line.line}:{index}"
    return replace(spec, attached=False, priority=min(spec.priority, PRIORITY), idempotency_key=key, labels=labels)


async def _body_of(endpoint: Endpoint, backend: Backend, asked: RequestModel, jobs: list[EndedJob]) -> object:
    return await endpoint.answer(backend, asked, jobs)


def _problem(code: str, message: str, line: int | None = None) -> dict[str, object]:
    return {"code": code, "message": message, "param": None, "line": line}


def _problem_of(line: BatchLine) -> dict[str, object]:
    error = json.loads(line.result)["response"]["body"]["error"]
    return {**_problem("invalid_request", error["message"], line.line), "param": error["param"]}
