"""`client.documents` against a service in memory over real gRPC: every call, broken connections, progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import cluster
from cluster import Client, Document
from cluster.client.documents.pieces import PIECE_BYTES
from cluster.client.retry import RetryPolicy
from tests.support.fakes.documents import ARCHIVE_PIECE, MAX_MODEL_LEN
from tests.support.fakes.server import FakeHead

FAST = RetryPolicy(attempts=4, first_s=0.02, largest_s=0.05)
UNKNOWN = "doc_" + "f" * 32
GONE = (grpc.StatusCode.UNAVAILABLE, "gone", ())


@pytest.fixture
def client(head: FakeHead) -> Iterator[Client]:
    with Client(head.address, retries=FAST) as opened:
        yield opened


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "a.py").write_text("import os\n")
    (folder / "logo.png").write_bytes(b"\x89PNG\0")
    return folder


def test_add_takes_every_kind_of_source(client: Client, head: FakeHead, project: Path) -> None:
    text = client.documents.add("a text", name="mine", max_tokens=900, pinned=True, shared=True)
    assert (text.name, text.scale_len, text.pinned, text.expires, text.source_hash) == ("mine", 900, True, 0.0, "")
    assert text.shared
    folder = client.documents.add(project)
    assert folder.name == "project"
    assert head.jobs.texts[folder.id] == b"Files:\nsrc/\n  a.py\n\n==> src/a.py <==\nimport os\n"
    latin = project.parent / "latin.txt"
    latin.write_bytes("Größe\n".encode("latin-1"))
    both = client.documents.add([latin, project])
    assert head.jobs.texts[both.id].startswith("==> latin.txt <==\nGröße\n".encode())
    alone = client.documents.add(latin, encoding="latin-1")
    assert len(alone.source_hash) == 64
    shown = cluster.read_source(project)
    assert client.documents.add(shown).id == folder.id
    assert [document.id for document in client.documents.list()] == [text.id, folder.id, both.id, alone.id]


def test_submit_takes_what_add_takes(client: Client, head: FakeHead, project: Path) -> None:
    for source in (project, [project], cluster.read_source(project), client.documents.add(project)):
        client.submit(source, "Why?")
    first, *others = [request.document.document_id for request in head.jobs.calls["Submit"]]
    assert first in head.jobs.files
    assert set(others) == {first}
    with pytest.raises(cluster.InvalidRequest, match="absent: cannot be read"):
        client.submit(project / "absent", "Why?")


def test_append(client: Client, head: FakeHead) -> None:
    first = client.documents.add("one")
    longer = client.documents.append(first.id, " two", name="longer")
    assert (head.jobs.texts[longer.id], longer.parent, longer.name) == (b"one two", first.id, "longer")
    with pytest.raises(cluster.NotFound):
        client.documents.append(UNKNOWN, "x")


def test_reading_ahead(client: Client, head: FakeHead) -> None:
    document, job = client.documents.add("a text", read=True)
    assert isinstance(document, Document)
    assert job.wait(10).done
    _, again = client.documents.append(document.id, " and more", read=True)
    third = client.documents.read(document.id)
    assert len({job.id, again.id, third.id}) == 3
    requests = head.jobs.calls["Submit"]
    assert [(request.document.read, list(request.document.questions)) for request in requests] == [(True, [])] * 3
    assert requests[0].document.document_id == document.id


def test_pins_and_deletion(client: Client) -> None:
    document = client.documents.add("a text")
    assert client.documents.pin(document.id).pinned
    assert client.documents.get(document.id).expires == 0.0
    assert not client.documents.unpin(document.id).pinned
    client.documents.delete(document.id)
    for call in (client.documents.get, client.documents.pin, client.documents.unpin, client.documents.delete):
        with pytest.raises(cluster.NotFound):
            call(document.id)


def test_tokens_are_counted_without_storing(client: Client, head: FakeHead, project: Path) -> None:
    count = client.documents.count_tokens("x" * 100)
    assert (count.tokens, count.size_bytes, count.max_model_len, count.fits) == (100, 100, MAX_MODEL_LEN, True)
    assert not client.documents.count_tokens("x" * MAX_MODEL_LEN).fits
    assert client.documents.count_tokens(project).tokens == len(cluster.read_source(project).data)
    assert not head.jobs.files


def test_a_document_goes_out_and_comes_in(client: Client, head: FakeHead, tmp_path: Path) -> None:
    document = client.documents.add("some text " * 1000)
    head.jobs.export_drops = [0, 3]  # it is begun anew
    told: list[tuple[str, int, int]] = []
    path = tmp_path / "it.longreach"
    size = client.documents.export(document.id, path, kv=False, progress=lambda *what: told.append(what))
    assert size == path.stat().st_size == len(document.id) + 1 + 10_000
    assert [request.without_kv for request in head.jobs.calls["ExportDocument"]] == [True] * 3
    assert told[-1] == ("receiving", size, max(size, 10_000 + 4 * 10_000))
    assert len(told) == 3 + -(-size // ARCHIVE_PIECE)
    with pytest.raises(cluster.InvalidRequest, match="exists: name another file"):
        client.documents.export(document.id, path)
    client.documents.export(document.id, path, overwrite=True)
    client.documents.delete(document.id)
    head.jobs.failures["ImportDocument"] = [GONE]
    assert client.documents.import_(path).id == document.id
    (tmp_path / "other").write_bytes(b"none of ours")
    with pytest.raises(cluster.InvalidRequest, match="archive: none of ours"):
        client.documents.import_(tmp_path / "other")


def test_an_export_gives_up(client: Client, head: FakeHead, tmp_path: Path) -> None:
    document = client.documents.add("text")
    head.jobs.export_drops = [0] * 10
    with pytest.raises(cluster.Unavailable):
        client.documents.export(document.id, tmp_path / "it")
    with pytest.raises(cluster.NotFound):
        client.documents.export(UNKNOWN, tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["UploadDocument", "AppendDocument", "CountTokens"])
def test_uploads_are_tried_again(client: Client, head: FakeHead, method: str) -> None:
    first = client.documents.add("first")
    head.jobs.failures[method] = [GONE] * 2
    source = "x" * (PIECE_BYTES + 5)
    told: list[int] = []
    if method == "UploadDocument":
        client.documents.add(source, progress=lambda what, done, total: told.append(done))
    elif method == "AppendDocument":
        client.documents.append(first.id, source, progress=lambda what, done, total: told.append(done))
    else:
        client.documents.count_tokens(source, progress=lambda what, done, total: told.append(done))
    assert head.jobs.pieces == [PIECE_BYTES, 5]
    assert told[-1] == PIECE_BYTES + 5
