"""The limits of a tenant: errors that name limit, value and way out, and tell nothing of others."""

from __future__ import annotations

from cluster.jobs.model import ServiceBusy
from cluster.jobs.tenants.tenant import Tenant

_QUEUE_AFTER_S = 10.0
_ROOM_AFTER_S = 60.0  # documents expire by the minute


def check_queued_jobs(tenant: Tenant, waiting: int) -> None:
    """Refuse one more job when so many of the tenant wait (ServiceBusy)."""
    most = tenant.max_queued_jobs
    if most is not None and waiting >= most:
        raise ServiceBusy(
            f"queue: {waiting} jobs of the key {tenant.name} wait: must be at most {most} (its limit queued-jobs): "
            "wait, cancel some, or have the limit raised",
            _QUEUE_AFTER_S,
        )


def check_document_bytes(tenant: Tenant, size: int) -> None:
    """Refuse an upload with which the tenant's documents take so many bytes (ServiceBusy)."""
    most = tenant.max_document_bytes
    if most is not None and size > most:
        raise ServiceBusy(
            f"documents: {size} bytes of the key {tenant.name} with this one: must be at most {most} together (its "
            "limit document-bytes): delete some, wait until some expire, or have the limit raised",
            _ROOM_AFTER_S,
        )
