"""Uploads in pieces that can begin anew, and archives that get their name when they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.client.documents.pieces import PIECE_BYTES, ArchiveFile, archive_pieces, upload_header, upload_pieces
from cluster.client.ingest.source import DocumentText
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 17])
def test_pieces_begin_anew(size: int) -> None:
    told: list[tuple[str, int, int]] = []
    header = upload_header("a", 9, True, "doc_1", True)
    pieces = upload_pieces(header, DocumentText(b"x" * size, source_hash="ab"), lambda *what: told.append(what))
    for _ in range(2):
        first, *rest = pieces()
        assert first.header == pb.DocumentHeader(
            name="a", max_tokens=9, pinned=True, append_to="doc_1", source_hash="ab", shared=True
        )
        assert b"".join(piece.data for piece in rest) == b"x" * size
        assert all(0 < len(piece.data) <= PIECE_BYTES for piece in rest)
    if size:
        assert told[-1] == ("sending", size, size)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "n" * 257}, "name: 257 characters"), ({"name": 5}, "name: 5: must be text"),
    ({"max_tokens": 0}, "max_tokens: 0: must be a whole number from 1"), ({"max_tokens": "9"}, "max_tokens: '9'"),
    ({"pinned": 1}, "pinned: 1: must be True or False"), ({"shared": 1}, "shared: 1: must be True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), BAD, ids=range(len(BAD)))
def test_bad_headers(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        upload_header(**({"name": None, "max_tokens": None, "pinned": False, "append_to": ""} | changed))


def test_an_archive_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    data = bytes(range(256)) * 5000
    path.write_bytes(data)
    told: list[tuple[str, int, int]] = []
    pieces = archive_pieces(path, lambda *what: told.append(what))
    for _ in range(2):
        assert b"".join(piece.data for piece in pieces()) == data
    assert told[-1] == ("sending", len(data), len(data))
    for wrong, said in ((tmp_path, "is a folder"), (tmp_path / "absent", "absent: cannot be read")):
        with pytest.raises(InvalidRequest, match=said):
            archive_pieces(wrong)


def test_an_archive_gets_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with ArchiveFile(path) as archive:
        archive.write(b"half")
        archive.begin()
        archive.write(b"whole")
        assert not path.exists()
        archive.finish()
    assert (path.read_bytes(), archive.size, path.stat().st_mode & 0o777) == (b"whole", 5, 0o600)
    with pytest.raises(InvalidRequest, match="exists: name another file"):
        ArchiveFile(path)
    with ArchiveFile(path, overwrite=True) as archive:
        archive.write(b"never finished")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_where_no_archive_can_be(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "its folder does not exist")):
        with pytest.raises(InvalidRequest, match=said):
            ArchiveFile(path)


def test_a_full_disk_is_one_line() -> None:
    with ArchiveFile("/dev/shm/longreach-test-archive", overwrite=True) as archive:
        assert archive._file is not None
        archive._file.close()
        archive._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(InvalidRequest, match=r"cannot be written \(No space left on device\)"):
            archive.write(b"x" * 100_000)
