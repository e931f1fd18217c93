"""Stored KV between stores and archives: what fails half-way leaves nothing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest

from cluster.common.errors import StageError
from cluster.jobs.document.archive import PIECE_BYTES, ArchiveWriter
from cluster.jobs.document.kv_transfer import kv_members
from cluster.jobs.model import InvalidJob, NotReady
from protos.stage import stage_pb2 as pb
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.archives import (
    LIMIT,
    TEXT,
    OpenBench,
    archive_of,
    check_nothing_kept,
    pieces,
    read,
    stored_kv,
)


def test_a_node_that_fails(open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    document = read(here)
    archive = archive_of(here, document)
    shard = type(there.runtime.shard)
    write, read_kv, calls = shard.write_kv, shard.read_kv, []

    def failing(self: object, given: object) -> object:
        calls.append(given)
        if len(calls) % 3 == 0:
            raise StageError("stage 0 shard 0: gone")
        return (write if self is there.runtime.shard else read_kv)(self, given)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "write_kv", failing)
    monkeypatch.setattr(shard, "read_kv", failing)
    with pytest.raises(NotReady, match="gone"):
        there.service.import_document(pieces(archive), LIMIT)
    check_nothing_kept(there, other)
    calls.clear()
    with pytest.raises(NotReady, match="gone"):
        archive_of(here, document)
    monkeypatch.undo()
    monkeypatch.setattr(there.runtime.kv_store, "node_shards", list)
    with pytest.raises(NotReady, match="being started"):
        there.service.import_document(pieces(archive), LIMIT)
    monkeypatch.undo()
    there.service.import_document(pieces(archive), LIMIT)
    assert set(other.written) == set(disk.written)


def test_a_full_disk_and_a_quota(open_bench: OpenBench, caplog: pytest.LogCaptureFixture) -> None:
    here, full, small = (
        open_bench(FakeDisk()),
        open_bench(FakeDisk(is_full=True)),
        open_bench(FakeDisk(free_bytes=9999)),
    )
    document = read(here)
    archive = archive_of(here, document)
    for bench, problem in ((full, "No space left"), (small, "kv_store.max_bytes")):
        assert bench.service.import_document(pieces(archive), LIMIT).tokens
        assert problem in caplog.text
        eventually(lambda bench=bench: bench.runtime.disk.written == {})  # type: ignore[misc]
        assert stored_kv(bench, document) == (0, 0)


def test_an_upload_that_breaks_off_and_a_crash(open_bench: OpenBench) -> None:
    disk, other = FakeDisk(), FakeDisk()
    here, there = open_bench(disk), open_bench(other)
    archive = archive_of(here, read(here))

    def cut(error: BaseException) -> Iterator[bytes]:
        yield archive[:-3000]
        assert other.written
        raise error

    with pytest.raises(InvalidJob, match="cut"):
        there.service.import_document(cut(InvalidJob("request: cut off")), LIMIT)
    check_nothing_kept(there, other)

    def crash() -> Iterator[bytes]:
        yield archive[:-3000]
        there.service.document_kv.sweep()
        assert other.written, "what is being imported is no orphan"
        there.service.document_kv._kv = type("Gone", (), {"is_enabled": False})()  # nothing is dropped any more
        raise SystemExit

    with pytest.raises(SystemExit):
        there.service.import_document(crash(), LIMIT)
    assert other.written
    there.restart()
    there.service.document_kv.sweep()
    check_nothing_kept(there, other)


def test_blocks_that_are_here_stay_as_they_are(open_bench: OpenBench) -> None:
    disk = FakeDisk()
    here = open_bench(disk)
    document = read(here)
    archive = archive_of(here, document)
    before = dict(disk.blocks)
    assert here.service.import_document(pieces(archive), LIMIT).id == document
    assert all(disk.blocks[key] is block for key, block in before.items())
    with pytest.raises(InvalidJob):
        here.service.import_document(pieces(archive[:-1500]), LIMIT)
    assert set(disk.written) == set(before)


def test_large_files_come_in_pieces_and_leave_no_file(open_bench: OpenBench) -> None:
    disk, other = FakeDisk(file_padding=9 << 20), FakeDisk(free_bytes=1 << 40)
    here, there = open_bench(disk), open_bench(other)
    document = read(here, TEXT[:400])
    whole = list(here.service.export_document(document, True))
    assert {len(piece) for piece in whole[:-1]} == {PIECE_BYTES}
    assert len(whole) > 9 * len(disk.written)
    begun = here.service.export_document(document, True)
    for _ in range(5):
        next(begun)
    begun.close()  # type: ignore[attr-defined]
    there.service.import_document(whole, LIMIT)
    assert set(other.written) == set(disk.written)
    for bench in (here, there):
        names = {path.name for path in (bench.folder / "documents").iterdir()}
        assert names == {document, f"{document}.ids"}


class Node:
    """Has files of every block, in pieces of three bytes; the last file may be cut off."""

    def __init__(self, files: dict[str, bytes], is_cut: bool = False) -> None:
        self.files, self.is_cut = files, is_cut

    def read_kv(self, keys: list[bytes]) -> Iterator[pb.KvFile]:
        for name, data in self.files.items():
            message = pb.KvFile(key=keys[0], name=name)
            for at in range(0, len(data), 3):
                message.data, message.is_last = data[at : at + 3], at + 3 >= len(data) and not self.is_cut
                yield message
                message = pb.KvFile()


def test_files_of_all_nodes_come_once(open_bench: OpenBench) -> None:
    documents = open_bench(None).service.documents
    one, two = Node({"a": b"abcdefgh", "b": b"b"}), Node({"b": b"other", "c": b"cde", "a": b"x" * 10})
    key = "00" * 32

    def members(*nodes: Node) -> bytes:
        writer = ArchiveWriter()
        return b"".join([*kv_members(writer, documents, nodes, [key]), *writer.end()])  # type: ignore[arg-type]

    with tarfile.open(fileobj=io.BytesIO(members(one, two))) as tar:
        found = {name: tar.extractfile(name).read() for name in tar.getnames()[:-1]}  # type: ignore[union-attr]
    assert found == {f"kv/{key}/a": b"abcdefgh", f"kv/{key}/b": b"b", f"kv/{key}/c": b"cde"}
    for cut in (Node({"c": b"cdefg"}, True), Node({"a": b"abc"}, True)):
        with pytest.raises(NotReady, match="cut off"):
            members(one, cut)
