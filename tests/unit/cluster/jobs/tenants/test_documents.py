"""The documents of a tenant, over documents in memory; with real ones it is in test_service."""

from __future__ import annotations

import pytest

from cluster.jobs.model import JobNotFound, NotAllowedNow
from cluster.jobs.tenants.documents import TenantDocuments
from cluster.jobs.tenants.tenant import Tenant
from tests.support.fakes.jobs_api import FakeJobService


def test_changes_are_noted_and_refused_ones_are_not() -> None:
    service, notes = FakeJobService(), []
    own, other = (service.add_document("a", [b"x"], 9, tenant=Tenant(name), shared=True).id for name in ("ann", "bob"))
    hidden = service.add_document("a", [b"y"], 9, tenant=Tenant("bob")).id
    documents = TenantDocuments(service, Tenant("ann"), lambda *note: notes.append(note))  # type: ignore[arg-type]
    assert {record.id for record in documents.list()} == {own, other}
    assert documents.read(other) == b"x"
    documents.pin(own, True)
    documents.pin(own, False)
    with pytest.raises(NotAllowedNow):
        documents.pin(other, True)
    for operation in (documents.get, documents.read, documents.delete):
        with pytest.raises(JobNotFound):
            operation(hidden)
    documents.delete(own)
    assert notes == [("pin_document", own), ("unpin_document", own), ("delete_document", own)]
