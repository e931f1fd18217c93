"""The limits of a tenant: what is refused, and what the error says."""

from __future__ import annotations

import pytest

from cluster.jobs.model import ServiceBusy
from cluster.jobs.tenants.limits import check_document_bytes, check_queued_jobs
from cluster.jobs.tenants.tenant import ANYONE, Tenant

LAW = Tenant("law", max_queued_jobs=2, max_document_bytes=4096)


def test_jobs_that_wait() -> None:
    check_queued_jobs(LAW, 1)
    check_queued_jobs(ANYONE, 1 << 40)
    with pytest.raises(
        ServiceBusy, match=r"^queue: 2 jobs of the key law wait: must be at most 2 .*queued-jobs.*: wait"
    ):
        check_queued_jobs(LAW, 2)


def test_bytes_of_documents() -> None:
    check_document_bytes(LAW, 4096)
    check_document_bytes(ANYONE, 1 << 60)
    with pytest.raises(ServiceBusy, match=r"^documents: 4097 bytes of the key law .* at most 4096 .*document-bytes"):
        check_document_bytes(LAW, 4097)
