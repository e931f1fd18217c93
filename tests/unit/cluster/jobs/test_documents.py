"""Documents: content-addressed, whole or absent, private, swept; whatever the client or the disk does."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs.documents import MAX_NAME, DocumentStore, display_name
from cluster.jobs.model import (
    ACTIVE,
    DocumentDamaged,
    InvalidJob,
    JobInput,
    JobNotFound,
    JobSpec,
    JobState,
    NotAllowedNow,
    ServiceBusy,
    new_id,
)
from cluster.jobs.store import JobStore
from protos.jobs.sampling import AnswerOptions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "documents"


@pytest.fixture
def documents(folder: Path, store: JobStore, clock: Clock) -> DocumentStore:
    return DocumentStore(folder, store, ttl_s=60.0, max_bytes=1 << 20, clock=clock)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [1, 15, 16, 17, 97, 100_003])
def test_content_is_the_name(documents: DocumentStore, folder: Path, size: int) -> None:
    content = os.urandom(size)
    record = documents.put("a.txt", (content[i : i + 16] for i in range(0, size, 16)), max_bytes=size)
    assert record.id == "doc_" + hashlib.sha256(content).hexdigest()[:32]
    assert (record.name, record.size_bytes, record.created, record.expires) == ("a.txt", size, 1000.0, 1060.0)
    assert documents.read(record.id) == content
    assert documents.list() == [record]
    assert names(folder) == [record.id]
    assert (folder / record.id).stat().st_mode & 0o777 == 0o600


def test_the_same_bytes_are_one_document(documents: DocumentStore, folder: Path, clock: Clock) -> None:
    first = documents.put("one", [b"ab", b"", b"c"], 10)
    clock.now = 1030.0
    assert documents.put("two", [b"abc"], 10) == replace(first, expires=1090.0, used=1030.0)
    assert names(folder) == [first.id]
    (folder / first.id).write_bytes(b"a")
    with pytest.raises(DocumentDamaged, match="1 bytes: must be 3: upload it again"):
        documents.read(first.id)
    documents.put("one", [b"abc"], 10)
    assert documents.read(first.id) == b"abc", "a new upload repairs a damaged file"


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"ab"), "2 bytes: must be 3"),
        (lambda path: path.write_bytes(b""), "0 bytes: must be 3"),
        (lambda path: path.write_bytes(b"abcdefgh"), "4 bytes or more: must be 3"),
        (lambda path: path.write_bytes(b"abd"), "other content"),
        (_as_folder, "cannot be read"),
        (_as_pipe, "cannot be read .not a regular file"),
        (_as_loop, "cannot be read"),
    ],
)
def test_a_damaged_file_is_the_trouble_of_its_jobs(
    documents: DocumentStore, folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    bad, good = documents.put("bad", [b"abc"], 100), documents.put("good", [b"good"], 100)
    damage(folder / bad.id)
    with pytest.raises(DocumentDamaged, match=message) as caught:
        documents.read(bad.id)
    assert isinstance(caught.value, InvalidJob), "the job fails by it, the store does not"
    assert documents.read(good.id) == b"good"


def test_a_folder_that_is_gone_is_no_damage_of_one_document(
    documents: DocumentStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = documents.put("a", [b"abc"], 100)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(JobStoreError, match="documents"):
        documents.read(record.id)
    folder.with_name("elsewhere").rename(folder)

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(JobStoreError, match="Too many open files"):
            documents.read(record.id)
    assert documents.read(record.id) == b"abc"


def test_a_document_that_is_too_large_is_not_read(documents: DocumentStore, folder: Path) -> None:
    record = documents.put("a", [b"abc"], 100)
    (folder / record.id).unlink()

    def refuse(size: int) -> None:
        raise InvalidJob(f"{size} bytes")

    with pytest.raises(InvalidJob, match="3 bytes"):
        documents.read(record.id, refuse)


def test_too_long_is_refused_at_once(documents: DocumentStore, folder: Path) -> None:
    taken: list[None] = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(None)
            yield b"x" * 10

    with pytest.raises(InvalidJob, match=r"40 bytes or more: must be at most 39 \(server\.max_document_bytes\)"):
        documents.put("a", endless(), 39)
    assert len(taken) == 4
    with pytest.raises(InvalidJob, match="0 bytes"):
        documents.put("a", [b"", b""], 39)
    assert (names(folder), documents.list()) == ([], [])


@pytest.mark.parametrize(
    "raised", [ConnectionResetError("gone"), RuntimeError("bad"), KeyboardInterrupt(), GeneratorExit()]
)
def test_a_client_that_goes_away(documents: DocumentStore, folder: Path, raised: BaseException) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        assert len(names(folder)) == 1
        assert next(folder.iterdir()).stat().st_mode & 0o777 == 0o600
        raise raised

    with pytest.raises(type(raised)):
        documents.put("a", pieces(), 100)
    assert (names(folder), documents.list()) == ([], [])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "No space left on device: free space"),
        (errno.EDQUOT, "free space"),
        (errno.EIO, "check its disk"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk(
    documents: DocumentStore, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str, call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(JobStoreError, match=message) as caught:
            documents.put("a", [b"abc"], 100)
    assert "\n" not in str(caught.value)
    assert (names(folder), documents.list()) == ([], [])
    assert documents.read(documents.put("a", [b"abc"], 100).id) == b"abc"


def test_a_short_write_is_continued(documents: DocumentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
        record = documents.put("a", [b"0123456789", b"abc"], 100)
    assert documents.read(record.id) == b"0123456789abc"


def test_a_record_that_cannot_be_written(documents: DocumentStore, store: JobStore, folder: Path) -> None:
    kept = documents.put("a", [b"kept"], 100)

    def fail(_: object) -> None:
        raise JobStoreError("full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "put_document", fail)
        for content in (b"kept", b"new"):
            with pytest.raises(JobStoreError, match="full"):
                documents.put("a", [content], 100)
    assert names(folder) == [kept.id]
    assert documents.read(kept.id) == b"kept"


@pytest.mark.parametrize("call", ["read", "get", "delete"])
@pytest.mark.parametrize(
    "document_id",
    ["", "..", "../jobs.db", "/etc/passwd", "doc_../../x", "doc_" + "A" * 32, "job_" + "0" * 32, "doc_\0"],
)
def test_ids_are_no_paths(documents: DocumentStore, call: str, document_id: str) -> None:
    with pytest.raises(InvalidJob, match="doc id"):
        getattr(documents, call)(document_id)


def test_absent_documents(documents: DocumentStore, folder: Path) -> None:
    call: Callable[[str], object]
    for call in (documents.read, documents.get, documents.delete):
        with pytest.raises(JobNotFound):
            call(new_id("doc"))
    record = documents.put("a", [b"abc"], 100)
    (folder / record.id).unlink()
    with pytest.raises(JobNotFound, match="its file is gone"):
        documents.read(record.id)
    documents.delete(record.id)
    assert documents.list() == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("report.txt", "report.txt"),
        ("", "document"),
        (" \r\n\t", "document"),
        ("a\0b\x1b[31m\nc", "ab[31m c"),
        ("\u202egnp.exe", "gnp.exe"),
        ("\ud800ü", "ü"),
        ("../../etc/passwd", "../../etc/passwd"),
        *[("é" * size, "é" * min(size, MAX_NAME)) for size in (MAX_NAME - 1, MAX_NAME, MAX_NAME + 1)],
    ],
)
def test_names_are_only_shown(documents: DocumentStore, name: str, shown: str) -> None:
    assert display_name(name) == shown
    assert documents.put(name, [b"abc"], 100).name == shown


def test_sweep(documents: DocumentStore, store: JobStore, folder: Path, clock: Clock) -> None:
    used, old = documents.put("used", [b"used"], 100), documents.put("old", [b"old"], 100)
    clock.now = 1030.0
    young = documents.put("young", [b"young"], 100)
    spec = JobSpec(JobInput(document_id=used.id, questions=("?",)), AnswerOptions())
    job, _ = store.create(spec, new_id("job"), 1, {})
    (folder / ".upload-left").write_bytes(b"x")
    (folder / new_id("doc")).write_bytes(b"a crash between file and record")
    (folder / "README").write_bytes(b"not ours")
    with pytest.raises(NotAllowedNow):
        documents.delete(used.id)
    assert documents.sweep(1060.0) == 1
    assert names(folder) == sorted(["README", used.id, young.id])
    with pytest.raises(JobNotFound):
        documents.get(old.id)
    assert store.transition(job.id, ACTIVE, JobState.SUCCEEDED)
    assert documents.sweep(1060.0) == 1
    documents.delete(young.id)
    assert names(folder) == ["README"]


def test_what_an_upload_left_that_was_killed_goes_at_the_start(store: JobStore, folder: Path) -> None:
    folder.mkdir()
    (folder / ".upload-left").write_bytes(b"x")
    (folder / "README").write_bytes(b"not ours")
    DocumentStore(folder, store, ttl_s=60.0, max_bytes=100)
    assert names(folder) == ["README"]


@pytest.mark.parametrize(
    "make",
    [Path.touch, lambda folder: folder.mkdir(0o555), lambda folder: folder.symlink_to("nowhere")],
)
def test_folders_that_are_refused(store: JobStore, folder: Path, make: Callable[[Path], None]) -> None:
    make(folder)
    with pytest.raises(JobStoreError, match="must be a folder that we may write"):
        DocumentStore(folder, store, ttl_s=60.0, max_bytes=100)


def refuse(documents: DocumentStore, content: bytes, inside: Callable[[], object] = lambda: None) -> None:
    """Bring a document with a submission that is refused after `inside`."""

    def submit() -> None:
        with documents.provisional("", [content], 100) as record:
            assert documents.read(record.id) == content
            inside()
            raise InvalidJob("refused")

    with pytest.raises(InvalidJob, match="refused"):
        submit()


def test_a_refused_submission_takes_its_document_along(documents: DocumentStore, store: JobStore, folder: Path) -> None:
    refuse(documents, b"abc")
    refuse(documents, b"abc", lambda: refuse(documents, b"abc"))
    assert (documents.list(), names(folder), documents._provisional) == ([], [], {})
    with documents.provisional("", [b"abc"], 100) as record:
        refuse(documents, b"abc")
        assert documents.read(record.id) == b"abc", "another submission has it"
    refuse(documents, b"abc")
    assert documents.list() == [record], "it was there before"
    refuse(documents, b"new", lambda: documents.put("a", [b"new"], 100))
    assert len(documents.list()) == 2, "it was uploaded meanwhile"

    def use() -> None:
        spec = JobSpec(JobInput(document_id=documents.list()[0].id, questions=("?",)), AnswerOptions())
        store.create(spec, new_id("job"), 1, {})

    refuse(documents, b"used", use)
    assert len(documents.list()) == len(names(folder)) == 3, "a job has it"
    assert documents._provisional == {}


def test_all_together_have_a_bound(store: JobStore, folder: Path, clock: Clock) -> None:
    documents = DocumentStore(folder, store, ttl_s=60.0, max_bytes=3 * 4096, clock=clock)
    kept = [documents.put("a", [bytes([n]) * 4000], 4096).id for n in range(2)]
    half: list[ServiceBusy] = []

    def pieces() -> Iterator[bytes]:
        yield b"x" * 4096
        with pytest.raises(
            ServiceBusy, match=r"must be at most 12288 together .server\.max_documents_bytes."
        ) as caught:
            documents.put("b", [b"y"], 4096)
        half.append(caught.value)

    kept.append(documents.put("a", pieces(), 4096).id)
    assert half[0].retry_after_s == 60.0
    with pytest.raises(ServiceBusy, match="delete some"):
        documents.put("c", [b"z"], 4096)
    assert names(folder) == sorted(kept)
    documents.delete(kept[0])
    documents.put("c", [b"z"], 4096)
    clock.now += 100.0
    assert documents.sweep(clock.now) == 3
    assert documents._uploading == {}


def test_sweep_leaves_running_uploads(documents: DocumentStore, folder: Path) -> None:
    half, swept = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"first "
        half.set()
        assert swept.wait(10)
        yield b"second"

    records = []
    upload = threading.Thread(target=lambda: records.append(documents.put("a", pieces(), 100)))
    upload.start()
    assert half.wait(10)
    assert documents.sweep(1e9) == 0
    swept.set()
    upload.join(10)
    assert documents.read(records[0].id) == b"first second"
    assert names(folder) == [records[0].id]


def test_parallel_uploads_of_one_document(documents: DocumentStore, folder: Path) -> None:
    threads = [threading.Thread(target=documents.put, args=("a", [b"x" * 1000] * 20, 1 << 20)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [record.size_bytes for record in documents.list()] == [20_000]
    assert names(folder) == [documents.list()[0].id]
