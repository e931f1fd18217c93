"""Batches as a tenant sees them: those of others never existed."""

from __future__ import annotations

import pytest

from cluster.jobs.model import JobNotFound, NotAllowedNow, new_id
from cluster.jobs.sqlite.batches import BatchRecord, BatchStatus
from cluster.jobs.tenants.service import TenantService
from cluster.jobs.tenants.tenant import Tenant
from tests.support.rigs.service import Bench


def of(bench: Bench, name: str, is_admin: bool = False) -> TenantService:
    return TenantService(bench.service, Tenant(name, is_admin), lambda action, subject: notes.append((action, subject)))


notes: list[tuple[str, str]] = []


def create(service: TenantService) -> str:
    made = BatchRecord(
        new_id("batch"), service.tenant.name, BatchStatus.VALIDATING, "/v1/completions", new_id("doc"), "24h", 1.0, 9e9
    )
    service.batches.create(made)
    return made.id


def test_batches_of_others_are_not_there(bench: Bench) -> None:
    ann, bob, root = of(bench, "ann"), of(bench, "bob"), of(bench, "root", True)
    mine, theirs = create(ann), create(bob)
    for service, ids in ((ann, [mine]), (bob, [theirs]), (root, [theirs, mine])):
        assert [batch.id for batch in service.batches.page(9, "")] == ids
    told = []
    for batch_id in (mine, new_id("batch")):
        for call in (bob.batches.get, bob.batches.cancel, lambda known: bob.batches.page(9, known)):
            with pytest.raises(JobNotFound) as caught:
                call(batch_id)
            told.append(str(caught.value).replace(batch_id, "ID"))
    assert len(set(told)) == 1
    assert ann.batches.get(mine).status is BatchStatus.VALIDATING
    assert [batch.id for batch in root.batches.page(9, theirs)] == [mine]


def test_cancelling_is_noted_once_and_not_for_one_that_has_ended(bench: Bench) -> None:
    ann = of(bench, "ann")
    batch_id = create(ann)
    notes.clear()
    assert [ann.batches.cancel(batch_id).status for _ in range(2)] == [BatchStatus.CANCELLING] * 2
    assert notes == [("cancel_batch", batch_id)]
    ended = create(ann)
    bench.service.batches.fail_batch(ended, [])
    with pytest.raises(NotAllowedNow, match="is failed"):
        ann.batches.cancel(ended)


def test_a_new_batch_is_the_tenants(bench: Bench) -> None:
    with pytest.raises(AssertionError):
        of(bench, "bob").batches.create(
            BatchRecord(new_id("batch"), "ann", BatchStatus.VALIDATING, "", "", "24h", 1.0, 2.0)
        )
