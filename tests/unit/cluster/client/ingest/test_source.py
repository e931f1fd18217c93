"""Sources as documents: texts as they are, files by their content, several of them under headers."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.client.ingest import source as module
from cluster.client.ingest.source import DocumentText, file_kind, read_source
from protos.errors import InvalidRequest
from tests.support.documents.office import docx, pdf, zipped


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_are_themselves(text: str) -> None:
    assert read_source(text) == DocumentText(text.encode())
    assert read_source(text.encode()) == DocumentText(text.encode())


@pytest.mark.parametrize("name", ["a.md", "b.json", "c.csv", "d.log", "e.py", "no ending"])
def test_utf8_files_are_sent_as_they_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = "ä,b\r\n\t{}\n".encode()
    path.write_bytes(data)
    assert read_source(path) == DocumentText(data, name)


def test_other_encodings_are_said(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    data = "Größe".encode("latin-1")
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    found = read_source(path)
    assert found == DocumentText("Größe".encode(), "old.txt", digest, ("taken as latin-1, not UTF-8",))
    assert read_source(path, "cp437").notes == ("taken as cp437, not UTF-8",)
    path.write_bytes(b"\xef\xbb\xbfx")
    assert read_source(path) == DocumentText(b"x", "old.txt", hashlib.sha256(b"\xef\xbb\xbfx").hexdigest())


@pytest.mark.parametrize("name", ["x.pdf", "x.docx", "x.zip", "x.html", "no ending"])
def test_formats_are_told_by_content(tmp_path: Path, name: str) -> None:
    contents = {"x.pdf": pdf(["a"]), "x.docx": docx("a", "b"), "x.html": b"<p>a</p>"}
    data = contents.get(name, zipped({"a": "x"}))
    path = tmp_path / name
    path.write_bytes(data)
    found = read_source(path)
    assert found.name == name
    assert found.source_hash == hashlib.sha256(data).hexdigest()
    assert found.notes
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / name).write_bytes(data)
    assert read_source(again / name) == found


@pytest.mark.parametrize(
    ("head", "name", "kind"),
    [
        (b"%PDF-1.7", "a", "pdf"), (b"junk\n%PDF-1.7", "a", "pdf"), (b"PK\x03\x04", "a.txt", "zip"),
        (b"PK\x05\x06", "a", "zip"), (gzip.compress(b"", mtime=0), "a", "tar"), (b"BZh9", "a", "tar"),
        (b"\xfd7zXZ\0", "a", "tar"), (b"\0" * 257 + b"ustar", "a", "tar"), (b"<html>", "a.HTM", "html"),
        (b"<html>", "a.txt", ""), (b"", "a", ""),
    ],
)  # fmt: skip
def test_kinds(head: bytes, name: str, kind: str) -> None:
    assert file_kind(Path(name), head) == kind


def test_several_sources_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("three\n")
    (tmp_path / "l").write_bytes(b"f\xfcnf")
    found = read_source([tmp_path / "b.txt", "one\n", tmp_path / "folder", tmp_path / "l"])
    assert found.data.decode() == (
        "==> b.txt <==\ntwo\n\n==> text <==\none\n\n==> folder <==\nFiles:\na\n\n==> a <==\nthree\n\n==> l <==\nfünf\n"
    )
    assert found.name == "b.txt and 3 more"
    assert found.notes == ("folder: 1 file", "l: taken as latin-1, not UTF-8")
    alone = read_source([tmp_path / "b.txt"])
    assert alone == read_source(tmp_path / "b.txt") == read_source(alone)
    assert read_source(["a", b"\xff"]).data == b"==> text <==\na\n\n==> text <==\n\xff\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (5, "document: 5: must be text, bytes or a path object, or a list of them"),
        ([], "document: an empty list"), ([5], "document: 5: must be text"), ("\ud800", "document: character"),
        (Path("/absent"), r"^/absent: cannot be read \(No such file"), (Path("a\0b"), r"^a\\x00b: cannot be read"),
        (Path("/dev/zero"), "^/dev/zero: is binary: must be text, PDF"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_read(source: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        read_source(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x7fELF\0\0\0", "is binary: must be text, PDF, Office, EPUB, HTML, zip or tar"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 old", "is a document of an old Office: save it as DOCX"),
        (gzip.compress(b"a log", mtime=0), "is a damaged tar file"),
        (b"%PDF-1.4", "is a damaged PDF"),
    ],
)
def test_files_without_text_are_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "new\nline"
    path.write_bytes(data)
    with pytest.raises(InvalidRequest) as caught:
        read_source(path)
    assert str(caught.value).startswith(rf"{tmp_path}/new\nline: {said}")


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 34)  # no byte is written
    with pytest.raises(InvalidRequest, match="huge: 17179869184 bytes: must be at most 268435456"):
        read_source(path)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(InvalidRequest, match=r"document: 12 bytes: must be at most 10"):
        read_source(["abcdef", "ghijkl"])


@pytest.mark.parametrize("data", [b"text", zipped({"a": "x"})])
def test_pipes_are_read(tmp_path: Path, data: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    found = read_source(pipe)
    writer.join()
    (tmp_path / "file").write_bytes(data)
    assert found.data == read_source(tmp_path / "file").data


def test_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    told: list[tuple[str, int, int]] = []
    read_source(tmp_path, progress=lambda *what: told.append(what))
    assert told == [(f"reading {tmp_path.name}", 0, 0), ("reading files", 1, 0)]


def test_a_folder_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert read_source(Path()).name == tmp_path.name
