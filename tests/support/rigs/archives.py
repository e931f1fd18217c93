"""Heads between which documents move as archives, and archives that are not what they should be."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator

from cluster.jobs.document.archive import ArchiveWriter
from cluster.jobs.model import JobInput, JobSpec, JobState
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

TEXT = b"The code of dark river is 1. " * 60
LIMIT = 1 << 20
OpenBench = Callable[[FakeDisk | None], Bench]


def ask(bench: Bench, document_id: str) -> int:
    """Return how many tokens of the prompt of a question were cached."""
    spec = JobSpec(JobInput(document_id, ("What is it?",)), AnswerOptions(max_tokens=2))
    job = bench.service.submit(spec)
    record = bench.service.wait(job.id, 20)
    assert record.state is JobState.SUCCEEDED, record.error
    return record.answers[0].cached_tokens


def read(bench: Bench, text: bytes = TEXT) -> str:
    """Add a document and ask about it, so that its KV is stored; returns its id."""
    document = bench.service.add_document("river", [text], LIMIT, source_hash="ab" * 32)
    assert ask(bench, document.id) == 0
    bench.runtime.kv_store.backlog.wait_empty(10)
    eventually(lambda: stored_kv(bench, document.id)[0])
    return document.id


def stored_kv(bench: Bench, document_id: str) -> tuple[int, int]:
    """Return tokens and bytes of the stored KV of a document."""
    return bench.service.stored_kv([bench.service.documents.get(document_id)]).get(document_id, (0, 0))


def archive_of(bench: Bench, document_id: str, with_kv: bool = True) -> bytes:
    return b"".join(bench.service.export_document(document_id, with_kv))


def pieces(archive: bytes, size: int = 1000) -> Iterator[bytes]:
    return (archive[at : at + size] for at in range(0, len(archive), size))


def check_nothing_kept(bench: Bench, disk: FakeDisk | None, *kept: bytes) -> None:
    assert bench.service.documents.list() == []
    assert list((bench.folder / "documents").iterdir()) == []
    if disk is not None:
        eventually(lambda: set(disk.written) == set(kept))
        eventually(lambda: bench.store.orphan_kv() == [])


def rebuilt(archive: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """Return an archive with other members, and checksums that agree."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()[:-1]}  # type: ignore[union-attr]
    change(members)
    writer = ArchiveWriter()
    made = [piece for name, data in members.items() for piece in writer.member(name, len(data), [data])]
    return b"".join([*made, *writer.end()])


def changed(archive: bytes, **values: object) -> bytes:
    """Return an archive whose manifest says something else; names are those of the manifest or of its parts."""

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        for name, value in values.items():
            part = next(part for part in (manifest, manifest["document"], manifest["model"]) if name in part)
            part[name] = value
        members["manifest.json"] = json.dumps(manifest).encode()

    return rebuilt(archive, change)


def hostile(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info.tobuf(fmt)
