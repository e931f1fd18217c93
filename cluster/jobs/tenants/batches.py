"""The batches that one tenant sees: its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cluster.jobs.model import JobNotFound, NotAllowedNow
from cluster.jobs.sqlite.batches import BatchRecord, BatchStatus
from protos.jobs.validate import show

if TYPE_CHECKING:
    from cluster.jobs.service import JobService
    from cluster.jobs.tenants.tenant import Tenant

_CANCELLED = (BatchStatus.CANCELLING, BatchStatus.CANCELLED)


class TenantBatches:
    """What clients may ask for of batches."""

    def __init__(self, service: JobService, tenant: Tenant, note: Callable[[str, str], None]) -> None:
        self._table = service.batches
        self._tenant = tenant
        self._note = note

    def create(self, batch: BatchRecord) -> None:
        """Store a new batch, whose owner is the tenant."""
        assert batch.owner == self._tenant.name, batch.owner
        self._table.create_batch(batch)
        self._note("create_batch", batch.id)

    def get(self, batch_id: str) -> BatchRecord:
        """Return a batch. Raises JobNotFound."""
        batch = self._table.get_batch(batch_id) if batch_id.isascii() else None
        if batch is None or not self._tenant.sees(batch.owner):
            raise JobNotFound(f"batch: {show(batch_id)}: not found (it may have expired)")
        return batch

    def page(self, limit: int, after: str) -> Sequence[BatchRecord]:
        """Return the newest batches, or those behind `after`, an id. Raises JobNotFound: no such batch."""
        known = self.get(after).id if after else ""
        return self._table.list_batches(None if self._tenant.is_admin else self._tenant.name, limit, known)

    def cancel(self, batch_id: str) -> BatchRecord:
        """Begin to cancel a batch, unless that was done before. Raises NotAllowedNow: it has ended otherwise."""
        known = self.get(batch_id).id
        running = [BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS]
        if self._table.move_batch(known, running, BatchStatus.CANCELLING):
            self._note("cancel_batch", known)
        batch = self.get(known)
        if batch.status not in _CANCELLED:
            raise NotAllowedNow(f"batch: {batch.id}: is {batch.status.value}: cannot be cancelled any more")
        return batch
