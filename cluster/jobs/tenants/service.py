"""The job service as one tenant sees it: what others own is not there.

Every request of a client, over gRPC and over HTTP, goes through here; `JobService` itself knows no callers. What
belongs to another tenant is told as what never existed, before anything of it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import DocumentRecord, JobRecord, JobSpec, JobState, check_id, job_not_found
from cluster.jobs.subscriptions import JobEvent
from cluster.jobs.tenants.batches import TenantBatches
from cluster.jobs.tenants.documents import TenantDocuments
from cluster.jobs.tenants.tenant import ANYONE, Tenant

if TYPE_CHECKING:
    from cluster.jobs.service import JobService

Note = Callable[[str, str], None]  # what was done, and the id of what it was done to


class TenantService:
    """The methods of `JobService` that clients may ask for, of the same names, and with the same errors."""

    def __init__(self, service: JobService, tenant: Tenant = ANYONE, note: Note = lambda action, subject: None) -> None:
        """
        Args:
            note: called with every change, for the audit log.
        """
        self.tenant = tenant
        self.documents = TenantDocuments(service, tenant, note)
        self.batches = TenantBatches(service, tenant, note)
        self._service = service
        self._note = note
        self._owner = None if tenant.is_admin else tenant.name  # of what is listed and counted

    def now(self) -> float:
        """Return the time of the head, in seconds since 1970."""
        return self._service.now()

    @property
    def is_draining(self) -> bool:
        """Whether no job is taken any more."""
        return self._service.is_draining

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec) -> JobRecord:
        """Store and queue a job of the tenant. Raises as `JobService.submit`."""
        if spec.input.document_id:
            self.documents.get(spec.input.document_id)
        record = self._service.submit(spec, self.tenant)
        self._note("submit", record.id)
        return record

    def _check(self, job_id: str) -> str:
        """Return the id of a job that the tenant sees. Raises InvalidJob, JobNotFound."""
        check_id(job_id, "job")
        if not self.tenant.is_admin and not self.tenant.sees(self._service.owner(job_id)):
            raise job_not_found(job_id)
        return job_id

    def get(self, job_id: str) -> JobRecord:
        return self._service.get(self._check(job_id))

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[OutputToken]:
        return self._service.tokens(self._check(job_id), after, limit)

    def progress(self, job_id: str) -> Mapping[int, PrefillProgress]:
        return self._service.progress(self._check(job_id))

    def jobs(
        self, states: Sequence[JobState], labels: Mapping[str, str], limit: int, cursor: str
    ) -> tuple[Sequence[JobRecord], str]:
        """Return jobs that the tenant sees, the newest first, and the cursor of the next page ("" at the end)."""
        return self._service.jobs(states, labels, limit, cursor, self._owner)

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        return self._service.wait(self._check(job_id), timeout_s)

    def stream(self, job_id: str, after: int = 0) -> Generator[JobEvent]:
        return self._service.stream(self._check(job_id), after)

    def cancel(self, job_id: str) -> JobRecord:
        record = self._service.cancel(self._check(job_id))
        self._note("cancel", job_id)
        return record

    def delete(self, job_id: str) -> None:
        self._service.delete(self._check(job_id))
        self._note("delete", job_id)

    # --- documents; what needs no job service is in `documents` ------------------------------------------------------

    def keep_text(self, text: str, max_bytes: int) -> AbstractContextManager[DocumentRecord]:
        return self._service.keep_text(text, max_bytes, self.tenant)

    def add_document(
        self, name: str, pieces: Iterable[bytes], max_bytes: int, *, max_tokens: int = 0, pinned: bool = False,
        source_hash: str = "", append_to: str = "", shared: bool = False,
    ) -> DocumentRecord:  # fmt: skip
        """Store a document of the tenant.

        Args:
            shared: all tenants see it, and its KV is everybody's; only its owner can change or delete it.
        """
        if append_to:
            self.documents.get(append_to)
        record = self._service.add_document(
            name, pieces, max_bytes, max_tokens=max_tokens, pinned=pinned, source_hash=source_hash,
            append_to=append_to, tenant=self.tenant, shared=shared,
        )  # fmt: skip
        self._note("upload_document", record.id)
        return record

    def export_document(self, document_id: str, with_kv: bool) -> Iterator[bytes]:
        pieces = self._service.export_document(self.documents.get(document_id).id, with_kv)
        self._note("export_document", document_id)
        return pieces

    def import_document(self, pieces: Iterable[bytes], max_bytes: int) -> DocumentRecord:
        record = self._service.import_document(pieces, max_bytes, self.tenant)
        self._note("import_document", record.id)
        return record

    def count_document(self, document_id: str) -> int:
        return self._service.count_document(self.documents.get(document_id).id)

    def count_text(self, content: bytes) -> int:
        return self._service.count_text(content)

    def stored_kv(self, records: Sequence[DocumentRecord]) -> Mapping[str, tuple[int, int]]:
        """As `JobService.stored_kv`; the records are those that `documents` gave."""
        return self._service.stored_kv(records)

    # --- the head ----------------------------------------------------------------------------------------------------

    def status(self) -> Mapping[str, Any]:
        """Return the fields of ClusterStatusReply; of jobs, those that the tenant sees are counted.

        What shows how much others do or have stored is left out.
        """
        status = dict(self._service.status())
        if not self.tenant.is_admin:
            status["queued"], status["running"] = self._service.counts(self.tenant.name)
            status |= {"kv_usage": 0.0, "kv_store_bytes": 0, "own_only": True}
        return status
