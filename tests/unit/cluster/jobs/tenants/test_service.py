"""The job service as a tenant sees it: nothing of another tenant comes out of any operation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.jobs.document.chain import chain_ids
from cluster.jobs.model import JobError, JobInput, JobNotFound, JobSpec, NotAllowedNow, ServiceBusy, new_id
from cluster.jobs.tenants.service import TenantService
from cluster.jobs.tenants.tenant import ANYONE, Tenant
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

NAMES = ("ann", "bob")
TEXTS = ("The same words. " * 20, "Other words. " * 20)
_folders = itertools.count()


def of(bench: Bench, name: str, **more: Any) -> TenantService:
    return TenantService(bench.service, Tenant(name, **more))


def spec(source: JobInput, key: str = "", **more: Any) -> JobSpec:
    return JobSpec(source, AnswerOptions(max_tokens=2), idempotency_key=key, **more)


def upload(service: TenantService, text: str = TEXTS[0], **more: Any) -> str:
    name = f"by {service.tenant.name}"
    return service.add_document(name, [text.encode()], 1 << 20, **more).id


def submit(service: TenantService, *, key: str = "", document_id: str = "") -> str:
    source = JobInput(document_id, ("why?",)) if document_id else JobInput(token_ids=(5,) * 40)
    return service.submit(spec(source, key, labels={"who": f"by {service.tenant.name}"})).id


def every_operation(job_id: str, document_id: str) -> dict[str, Callable[[TenantService], Any]]:
    """Every method of a tenant's service that names a job or a document."""
    return {
        "get": lambda s: s.get(job_id),
        "tokens": lambda s: s.tokens(job_id),
        "progress": lambda s: s.progress(job_id),
        "wait": lambda s: s.wait(job_id, 0.0),
        "stream": lambda s: next(s.stream(job_id)),
        "cancel": lambda s: s.cancel(job_id),
        "delete": lambda s: s.delete(job_id),
        "submit": lambda s: s.submit(spec(JobInput(document_id, ("why?",)))),
        "add_document": lambda s: s.add_document("", [b"more"], 1 << 20, append_to=document_id),
        "export_document": lambda s: b"".join(s.export_document(document_id, False)),
        "count_document": lambda s: s.count_document(document_id),
        "documents.get": lambda s: s.documents.get(document_id),
        "documents.read": lambda s: s.documents.read(document_id),
        "documents.pin": lambda s: s.documents.pin(document_id, True),
        "documents.path": lambda s: s.documents.path(document_id),
        "documents.delete": lambda s: s.documents.delete(document_id),
    }


NAMELESS = {
    "now", "is_draining", "jobs", "keep_text", "import_document", "count_text", "stored_kv", "status", "documents.list",
    "documents.page", "documents.spool", "documents.receiving", "documents.put",
}  # fmt: skip


def test_every_method_is_among_the_operations(bench: Bench) -> None:
    """A new method must say below whether it names a job or a document."""
    service = of(bench, "ann")
    found = {name for name in dir(service) if not name.startswith("_")} - {"tenant", "documents", "batches"}
    found |= {f"documents.{name}" for name in dir(service.documents) if not name.startswith("_")}
    assert found == {*every_operation("", ""), *NAMELESS}


def test_what_another_owns_is_what_never_existed(bench: Bench) -> None:
    ann, bob, root = of(bench, "ann"), of(bench, "bob"), of(bench, "root", is_admin=True)
    job_id, document_id = submit(ann), upload(ann)
    absent = new_id("job"), new_id("doc")
    for name in every_operation("", ""):
        told = []
        for ids in ((job_id, document_id), absent):
            with pytest.raises(JobNotFound) as caught:
                every_operation(*ids)[name](bob)
            told.append(str(caught.value).replace(ids[0], "ID").replace(ids[1], "ID"))
        assert told[0] == told[1], name
    assert ann.get(job_id).owner == root.get(job_id).owner == "ann"
    assert TenantService(bench.service, ANYONE).documents.get(document_id).owner == "ann"
    assert root.cancel(job_id).id == job_id
    assert [record.id for record in bob.jobs([], {}, 10, "")[0]] == []
    assert (bob.status()["queued"], bob.status()["running"]) == (0, 0)
    assert "own_only" not in root.status()
    hidden = {"kv_usage": 0.0, "kv_store_bytes": 0, "own_only": True}
    assert bob.status().items() >= hidden.items()


def test_the_same_key_and_text_are_nothing_in_common(bench: Bench) -> None:
    ann, bob = of(bench, "ann"), of(bench, "bob")
    documents = upload(ann), upload(bob)
    assert documents[0] != documents[1]
    assert [record.name for record in bob.documents.list()] == ["by bob"]
    jobs = submit(ann, key="once"), submit(bob, key="once")
    assert jobs[0] != jobs[1]
    assert submit(ann, key="once") == jobs[0]
    ann.documents.delete(documents[0])
    assert bob.documents.read(documents[1]) == TEXTS[0].encode()


def test_a_shared_document_is_everybodys_to_read(bench: Bench) -> None:
    ann, bob = of(bench, "ann"), of(bench, "bob")
    document_id = upload(ann, shared=True)
    assert bob.documents.read(document_id) == TEXTS[0].encode()
    assert [record.id for record in bob.documents.list()] == [document_id]
    assert bob.get(submit(bob, document_id=document_id)).owner == "bob"
    own = bob.add_document("", [b"more"], 1 << 20, append_to=document_id)
    assert (own.owner, own.shared, own.parent) == ("bob", False, document_id)
    assert bob.documents.read(own.id) == TEXTS[0].encode() + b"more"
    for change in (lambda: bob.documents.delete(document_id), lambda: bob.documents.pin(document_id, True)):
        with pytest.raises(NotAllowedNow, match="shared by another key"):
            change()
    for record in bob.jobs([], {}, 10, "")[0]:
        bob.cancel(record.id)
    ann.documents.delete(document_id)


def test_archives_go_from_owner_to_owner(bench: Bench) -> None:
    ann, bob = of(bench, "ann"), of(bench, "bob")
    first = upload(ann)
    grown = ann.add_document("", [b"And more."], 1 << 20, append_to=first).id
    archive = b"".join(ann.export_document(grown, True))
    imported = bob.import_document(iter([archive]), 1 << 20)
    assert imported.id not in (first, grown)
    assert (imported.owner, imported.seams) == ("bob", (len(TEXTS[0]),))
    assert bob.documents.read(imported.id) == ann.documents.read(grown)
    assert ann.import_document(iter([archive]), 1 << 20).id == grown
    content = bob.documents.read(imported.id)
    for document_id in (*chain_ids(content, imported.seams), *chain_ids(content[: len(TEXTS[0])], [])):
        assert document_id.encode() in archive, "an archive has the ids that do not depend on the owner"


def test_limits_of_a_tenant(bench: Bench) -> None:
    bench.runtime.shard.hold()
    bob = of(bench, "bob")
    ann = of(bench, "ann", max_queued_jobs=2, max_document_bytes=8192)
    waiting: list[str] = []
    with pytest.raises(ServiceBusy, match=r"jobs of the key ann wait: must be at most 2 \(its limit queued-jobs\)"):
        waiting.extend(submit(ann) for _ in range(10))
    submit(bob)
    ann.cancel(ann.jobs([], {}, 1, "")[0][0].id)
    upload(ann, "x")
    with pytest.raises(ServiceBusy, match=r"of the key ann with this one: must be at most 8192 .*document-bytes"):
        upload(ann, "y" * 8193)
    upload(bob, "y" * 8193)


def test_requests_at_once_do_not_share_the_last_place(bench: Bench) -> None:
    bench.runtime.shard.hold()
    others = of(bench, "bob")
    for _ in range(4):
        submit(others)  # run and wait before all else
    eventually(lambda: others.status()["running"] > 0)
    ann = of(bench, "ann", max_queued_jobs=3, max_document_bytes=5 * 4096)

    def attempt(action: Callable[[], str]) -> bool:
        try:
            return bool(action())
        except ServiceBusy:
            return False

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(attempt, [partial(submit, ann)] * 12)) == 3
        kept = sum(pool.map(attempt, [partial(upload, ann, f"{n} " * 2000) for n in range(10, 22)]))
    assert bench.store.documents_size("ann") <= 5 * 4096 + kept * 3 * 4096  # files of token ids come afterwards
    assert sum(one.size_bytes for one in ann.documents.list()) <= 5 * 4096
    assert len(ann.documents.list()) == kept


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30))
def test_nothing_of_another_comes_out(make: Callable[..., Bench], seed: int) -> None:
    """Random operations on random ids: whatever is returned or raised names nothing that another owns."""
    rng = random.Random(seed)
    bench = make()
    services = {name: of(bench, name) for name in NAMES}
    owned: dict[str, set[str]] = {name: set() for name in NAMES}
    ids = {"job": [new_id("job")], "doc": [new_id("doc")]}

    def note(name: str, kind: str, found: str) -> str:
        owned[name].add(found)
        ids[kind].append(found)
        return found

    for _ in range(40):
        name = rng.choice(NAMES)
        service = services[name]
        choices: dict[str, Callable[[TenantService], Any]] = {
            "upload": lambda s: note(s.tenant.name, "doc", upload(s, rng.choice(TEXTS))),
            "once": lambda s: note(s.tenant.name, "job", submit(s, key=rng.choice("xy"))),
            "jobs": lambda s: s.jobs([], {}, rng.randint(1, 5), ""),
            "status": lambda s: (s.status()["queued"], s.status()["running"]),
            "list": lambda s: s.documents.list(),
            **every_operation(rng.choice(ids["job"]), rng.choice(ids["doc"])),
        }
        operation = rng.choice(list(choices))
        try:
            told = choices[operation](service)
            if operation in ("submit", "add_document"):
                note(name, "job" if operation == "submit" else "doc", told.id)
        except JobNotFound:
            continue  # names what was asked for
        except JobError as error:
            told = error
        for other in NAMES:
            if other != name:
                assert f"by {other}" not in repr(told), operation
                assert not any(one in repr(told) for one in owned[other] - owned[name]), operation
    bench.close()
