"""What callers hand over, as the text of one document: texts, files of many formats, folders, or several of them."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.client.ingest.conversion import ConversionLimits, convert
from cluster.client.ingest.limits import MAX_BYTES, Budget
from cluster.client.ingest.text import NotText, decode, is_binary
from cluster.client.ingest.tree import Progress, folder_text, reading, section, show_path
from protos.errors import InvalidRequest
from protos.jobs.limits import MAX_CHARS
from protos.jobs.validate import check_text, show

_HTML = (".html", ".htm", ".xhtml")
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # gzip, bzip2, xz
_OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_PIECE = 1 << 20
_LIMITS = ConversionLimits()
_READABLE = ": must be text, PDF, Office, EPUB, HTML, zip or tar"


@dataclass(frozen=True, slots=True)
class DocumentText:
    """The text of a document before it is sent.

    `data` is the text as UTF-8, `source_hash` the SHA-256 of the file it was taken from when that has other bytes,
    and `notes` is what a user should know about how it was read, a line each.
    """

    data: bytes
    name: str = "text"
    source_hash: str = ""
    notes: tuple[str, ...] = ()


Source = str | bytes | os.PathLike[str] | DocumentText


def read_source(
    source: Source | Sequence[Source], encoding: str | None = None, progress: Progress | None = None
) -> DocumentText:
    """Return the text of a source: a `str` is the text itself, `bytes` are UTF-8, a path object is a file or folder.

    What a folder or a PDF becomes can be looked at before it is added; `documents.add` and `submit` take the result.
    Of several sources the texts follow each other in the given order, each under a header with its name.

    Args:
        encoding: of text files; by default it is found out.

    Raises:
        InvalidRequest: a source cannot be read or has no text.

    >>> text = read_source([Path("project/"), Path("notes.pdf")])
    >>> print(text.data.decode(), *text.notes)
    """
    if isinstance(source, (str, bytes)) or not isinstance(source, Sequence):
        return _read_one(source, encoding, progress)
    if not source:
        raise InvalidRequest("document: an empty list: must be at least one text or path")
    parts = [_read_one(one, encoding, progress) for one in source]
    if len(parts) == 1:
        return parts[0]
    total = sum(len(part.data) for part in parts)
    if total > MAX_BYTES:
        raise InvalidRequest(f"document: {total} bytes: must be at most {MAX_BYTES}")
    # bytes of a caller that are no UTF-8 stay what they are: the head refuses them
    texts = [
        section(show_path([os.fsencode(part.name)]), part.data.decode("utf-8", "surrogateescape")) for part in parts
    ]
    notes = [f"{part.name}: {note}" for part in parts for note in part.notes]
    name = f"{parts[0].name} and {len(parts) - 1} more"[:MAX_CHARS]
    return DocumentText("\n".join(texts).encode("utf-8", "surrogateescape"), name, "", tuple(notes))


def _read_one(source: object, encoding: str | None, progress: Progress | None) -> DocumentText:
    if isinstance(source, DocumentText):
        return source
    if isinstance(source, str):
        return DocumentText(check_text("document", source).encode())
    if isinstance(source, bytes):
        return DocumentText(source)
    if not isinstance(source, os.PathLike):
        raise InvalidRequest(f"document: {show(source)}: must be text, bytes or a path object, or a list of them")
    path = Path(source)
    if progress is not None:
        progress(f"reading {path.name}", 0, 0)
    with reading(path):
        is_folder = path.is_dir()
    name = (path.name or path.resolve().name).encode("utf-8", "replace").decode()[:MAX_CHARS] or "folder"
    if is_folder:
        found = folder_text(path, Budget(), progress)
        return DocumentText(found.text.encode("utf-8", "replace"), name, "", found.notes())
    try:
        with _open(path) as file:
            return read_file(file, name, encoding)
    except InvalidRequest as error:
        shown = show_path([os.fsencode(path)])
        raise InvalidRequest(str(error) if str(error).startswith(shown) else f"{shown}: {error}") from error


def read_file(
    file: BinaryIO, name: str, encoding: str | None = None, limits: ConversionLimits = _LIMITS
) -> DocumentText:
    """Return the text of an open file.

    Args:
        file: a real file, at its beginning.
        name: of the file, whose suffix tells HTML from other text.
        encoding: as of `read_source`.
        limits: what taking the text out of a file of a format may cost.

    Raises:
        InvalidRequest: as of `read_source`.
    """
    head = file.read(1024)
    if head.startswith(_OLD_OFFICE):
        raise InvalidRequest("is a document of an old Office: save it as DOCX, PPTX or XLSX")
    kind = file_kind(Path(name), head) if encoding is None else ""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not kind and size > MAX_BYTES:
        raise _too_large(size)
    if kind:
        digest = _digest(file)
        data, notes = convert(kind, file, limits)
        return DocumentText(data, name, digest, notes)
    data = file.read(MAX_BYTES)
    try:
        text, found = decode(data, encoding)
    except NotText as error:
        raise InvalidRequest(f"{error}{_READABLE if encoding is None else ''}") from error
    encoded = text.encode("utf-8", "replace")
    if encoded == data:
        return DocumentText(data, name)
    notes = () if found == "utf-8-sig" else (f"taken as {found}, not UTF-8",)
    return DocumentText(encoded, name, hashlib.sha256(data).hexdigest(), notes)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and seeking; what comes out of a pipe or device is copied into one first."""
    with ExitStack() as opened:
        with reading(path):
            file: BinaryIO = opened.enter_context(path.open("rb"))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                copy = opened.enter_context(tempfile.TemporaryFile())
                _copy(path, file, copy)
                file = copy
        yield file


def _copy(path: Path, source: BinaryIO, target: BinaryIO) -> None:
    size = 0
    while piece := source.read(_PIECE):
        if not size and not file_kind(path, piece) and is_binary(piece):
            raise InvalidRequest(f"is binary{_READABLE}")
        size += len(piece)
        if size > MAX_BYTES:  # of a file that has no end
            raise _too_large(size)
        target.write(piece)
    target.flush()
    target.seek(0)


def _too_large(size: int) -> InvalidRequest:
    return InvalidRequest(f"{size} bytes: must be at most {MAX_BYTES}: no document is longer")


def file_kind(path: Path, head: bytes) -> str:
    """Return how a file with these first bytes is read, as of `worker.extract`; "" as text."""
    if b"%PDF-" in head:
        return "pdf"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(_PACKED) or head[257:262] == b"ustar":
        return "tar"
    return "html" if path.suffix.lower() in _HTML else ""
