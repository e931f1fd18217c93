"""The documents that one tenant sees: its own, and those that others share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cluster.jobs.model import DocumentRecord, NotAllowedNow, document_not_found

if TYPE_CHECKING:
    from cluster.jobs.service import JobService
    from cluster.jobs.tenants.tenant import Tenant


class TenantDocuments:
    """The methods of `DocumentStore` that clients may ask for, of the same names, and with the same errors."""

    def __init__(self, service: JobService, tenant: Tenant, note: Callable[[str, str], None]) -> None:
        self._documents = service.documents
        self._tenant = tenant
        self._note = note

    def get(self, document_id: str) -> DocumentRecord:
        record = self._documents.get(document_id)
        if not (record.shared or self._tenant.sees(record.owner)):
            raise document_not_found(document_id)
        return record

    def list(self) -> Sequence[DocumentRecord]:
        return self._documents.list(None if self._tenant.is_admin else self._tenant.name)

    def read(self, document_id: str, check_size: Callable[[int], None] = lambda size: None) -> bytes:
        return self._documents.read(self.get(document_id).id, check_size)

    def page(self, limit: int, after: str, purpose: str | None, newest_first: bool) -> Sequence[DocumentRecord]:
        """Return a part of the list. Args: as of `DocumentTable.page_documents`."""
        owner = None if self._tenant.is_admin else self._tenant.name
        return self._documents.store.page_documents(limit, after, purpose, newest_first, owner)

    def path(self, document_id: str) -> Path:
        return self._documents.path(self.get(document_id).id)

    def spool(self) -> IO[bytes]:
        return self._documents.spool()

    def receiving(self) -> AbstractContextManager[Callable[[int], None]]:
        return self._documents.receiving(self._tenant)

    def put(self, name: str, pieces: Iterable[bytes], max_bytes: int, purpose: str) -> DocumentRecord:
        """Store a file of the tenant that nobody asks about."""
        record = self._documents.put(name, pieces, max_bytes, purpose=purpose, tenant=self._tenant)
        self._note("upload_document", record.id)
        return record

    def pin(self, document_id: str, pinned: bool) -> DocumentRecord:
        record = self._documents.pin(self._own(document_id), pinned)
        self._note("pin_document" if pinned else "unpin_document", document_id)
        return record

    def delete(self, document_id: str) -> None:
        self._documents.delete(self._own(document_id))
        self._note("delete_document", document_id)

    def _own(self, document_id: str) -> str:
        """Return the id of a document that the tenant may change. Raises InvalidJob, JobNotFound, NotAllowedNow."""
        record = self.get(document_id)
        if not self._tenant.sees(record.owner):
            raise NotAllowedNow(f"document: {document_id}: is shared by another key: only that key can change it")
        return document_id
