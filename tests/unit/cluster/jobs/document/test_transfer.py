"""Documents out of one head and into another: text, tokens and the KV that fits."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import pytest

from cluster.jobs.document.token_file import tokens_path
from cluster.jobs.model import InvalidJob, JobInput, JobNotFound, JobSpec
from cluster.jobs.prompts import job_prompts
from cluster.jobs.tenants.tenant import Tenant
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.archives import (
    LIMIT,
    TEXT,
    OpenBench,
    archive_of,
    ask,
    changed,
    check_nothing_kept,
    pieces,
    read,
    rebuilt,
    stored_kv,
)


def test_round_trip(open_bench: OpenBench) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    name = read(here)
    archive = archive_of(here, name)
    assert archive == archive_of(here, name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = tar.getnames()
        sums = tar.extractfile("SHA256SUMS").read().decode().splitlines()  # type: ignore[union-attr]
        content = {member: tar.extractfile(member).read() for member in names[:-1]}  # type: ignore[union-attr]
    assert names[:3] == ["manifest.json", "text", "ids"]
    assert sums == [f"{hashlib.sha256(data).hexdigest()}  {member}" for member, data in content.items()]
    assert {member.split("/")[1] for member in names[3:-1]} == {key.hex() for key in disk.written}

    record = there.service.import_document(pieces(archive), LIMIT)
    original = here.service.documents.get(name)
    fields = ("id", "name", "size_bytes", "tokens", "scale_len", "source_hash", "parent", "seams", "kernel_family")
    assert [getattr(record, field) for field in fields] == [getattr(original, field) for field in fields]
    assert there.service.documents.read(name) == TEXT
    assert set(other.written) == set(disk.written)
    assert stored_kv(there, name)[0] == stored_kv(here, name)[0] > 0
    ids = [tokens_path(bench.service.documents.path(name)).read_bytes() for bench in (here, there)]
    assert ids[0] == ids[1]
    stored = 64 * len(disk.written)
    assert 0 < stored - 64 <= ask(there, name) <= stored
    there.service.documents.delete(name)
    there.service.document_kv.sweep()
    check_nothing_kept(there, other)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("fingerprint", "other", "model"),
        ("kv_dtype", "int8", "type of KV"),
        ("dtype", "bfloat16", "type of computation"),
        ("positions", "yarn", "positions"),
        ("sparse", "sparse", "sparse"),
        ("root", "00", "all settings"),
        ("block_tokens", 512, "block_tokens"),
    ],
)
def test_kv_of_something_else_is_left_out(
    open_bench: OpenBench, caplog: pytest.LogCaptureFixture, name: str, value: object, problem: str
) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    document = read(here)
    archive = archive_of(here, document)
    if name == "block_tokens":
        blocks = [{"key": key.hex(), "parent": "", "start": 0} for key in disk.written]
        archive = changed(archive, block_tokens=value, blocks=blocks)
        archive = rebuilt(archive, lambda members: [members.pop(n) for n in list(members) if n[:3] == "kv/"] and None)
    else:
        archive = changed(archive, **{name: value})
    assert there.service.import_document(pieces(archive), LIMIT).tokens
    (line,) = [record.getMessage() for record in caplog.records if "without its KV" in record.getMessage()]
    assert problem in line
    assert other.written == {}
    assert ask(there, document) == 0


def test_kernels_of_another_family(open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here = open_bench(disk)
    document = read(here)
    archive = archive_of(here, document)
    monkeypatch.setattr("tests.support.fakes.runtime.FakeRuntime.kernel_family", "small")
    there = open_bench(other)
    assert there.service.import_document(pieces(archive), LIMIT).kernel_family == "fake"
    assert ask(there, document) >= 64 * (len(disk.written) - 1)
    job = there.service.jobs([], {}, 1, "")[0][0]
    assert job.reproducibility["versions"]["kernels"] == "fake"
    again = archive_of(there, document)
    assert json.loads(again[512 : again.index(b"\0", 512)])["model"]["kernel_family"] == "fake"
    monkeypatch.undo()
    home = open_bench(FakeDisk())
    assert home.service.import_document(pieces(again), LIMIT).kernel_family == ""
    assert ask(home, document) >= 64 * (len(disk.written) - 1)


def test_a_document_that_is_here_keeps_its_kernels(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = open_bench(FakeDisk())
    archive = archive_of(here, read(here))
    monkeypatch.setattr("tests.support.fakes.runtime.FakeRuntime.kernel_family", "small")
    other = FakeDisk()
    there = open_bench(other)
    document = read(there)
    own = set(other.written)
    assert there.service.import_document(pieces(archive), LIMIT).kernel_family == ""
    assert set(other.written) == own
    assert "kernels (ours): delete it" in caplog.text
    assert ask(there, document) > 0


def test_without_kv_and_without_a_store(open_bench: OpenBench) -> None:
    here, there, bare = open_bench(FakeDisk()), open_bench(FakeDisk()), open_bench(None)
    document = read(here)
    with pytest.raises(JobNotFound):
        here.service.export_document("doc_" + "0" * 32, True)
    small, whole = archive_of(here, document, with_kv=False), archive_of(here, document)
    assert b"kv/" not in small
    for archive, bench in ((small, there), (whole, bare)):
        assert bench.service.import_document(pieces(archive), LIMIT).tokens
        assert bench.service.documents.read(document) == TEXT
        assert stored_kv(bench, document) == (0, 0)
    assert b"kv/" not in archive_of(bare, document)


def test_ids_of_another_tokenizer_are_not_used(open_bench: OpenBench) -> None:
    here, there = open_bench(None), open_bench(None)
    document = here.service.add_document("a", [TEXT], LIMIT).id
    archive = changed(archive_of(here, document), tokenizer="00" * 32)
    archive = rebuilt(archive, lambda members: members.update(ids=bytes(len(members["ids"]))))
    assert there.service.import_document(pieces(archive), LIMIT).tokens == 0
    eventually(lambda: there.service.documents.get(document).tokens > 0)
    ids = [tokens_path(bench.service.documents.path(document)).read_bytes() for bench in (here, there)]
    assert ids[0] == ids[1]
    wrong = rebuilt(archive_of(here, document), lambda members: members.update(ids=b"\xff" * len(members["ids"])))
    with pytest.raises(InvalidJob, match="a token that this model does not have"):
        there.service.import_document(pieces(wrong), LIMIT)


def test_appended_documents(open_bench: OpenBench) -> None:
    here, there = open_bench(FakeDisk()), open_bench(FakeDisk())
    first = read(here)
    longer = here.service.add_document("", [b"And so on."], LIMIT, append_to=first)
    ask(here, longer.id)
    record = there.service.import_document(pieces(archive_of(here, longer.id)), LIMIT)
    assert (record.id, record.parent, record.seams) == (longer.id, first, (len(TEXT),))
    longest = [bench.service.add_document("", [b" End."], LIMIT, append_to=longer.id).id for bench in (here, there)]
    assert longest[0] == longest[1]


@pytest.mark.parametrize("is_admin", [True, False])
def test_only_an_admin_says_what_the_tokens_of_a_text_are(open_bench: OpenBench, is_admin: bool) -> None:
    here, there = open_bench(None), open_bench(None)
    tenant = Tenant("bob", is_admin)
    document = here.service.add_document("a", [TEXT], LIMIT).id
    forged = rebuilt(archive_of(here, document), lambda members: members.update(ids=bytes(len(members["ids"]))))
    name = there.service.import_document(pieces(forged), LIMIT, tenant).id
    eventually(lambda: there.service.documents.get(name).tokens > 0)
    spec = JobSpec(JobInput(name, ("Why?",)), AnswerOptions(max_tokens=1))
    (prompt,) = job_prompts(there.runtime, there.service.document_tokens, spec)
    text = there.runtime.tokenizer.decode(prompt, skip_special=False)
    assert (TEXT.decode() in text) != is_admin


def test_an_archive_of_a_shared_document_has_nothing_of_its_questions(open_bench: OpenBench) -> None:
    disk = FakeDisk()
    here = open_bench(disk)
    document = here.service.add_document("a", [TEXT], LIMIT, tenant=Tenant("ann"), shared=True)
    question = JobSpec(JobInput(document.id, ("Why is the river dark? " * 80,)), AnswerOptions(max_tokens=1))
    here.service.wait(here.service.submit(question, Tenant("ann")).id, 20)
    here.runtime.kv_store.backlog.wait_empty(10)
    last = here.service.document_tokens.head_tokens() + here.service.count_document(document.id)
    eventually(lambda: len(disk.written) > last // 64)
    with tarfile.open(fileobj=io.BytesIO(archive_of(here, document.id))) as tar:
        blocks = {name.split("/")[1] for name in tar.getnames() if name.startswith("kv/")}
    assert len(blocks) == last // 64
