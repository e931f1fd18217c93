"""Documents and archives as messages of an upload, and an archive that arrives as a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from cluster.client.ingest.source import DocumentText
from cluster.client.ingest.tree import Progress, reading
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.limits import MAX_CHARS, MAX_UINT32

PIECE_BYTES = 1 << 20  # of one message


def upload_header(
    name: str | None, max_tokens: int | None, pinned: bool, append_to: str, shared: bool = False
) -> pb.DocumentHeader:
    """Return the header of an upload; its values are checked (InvalidRequest)."""
    if name is not None:
        validate.check_text("name", name, MAX_CHARS)
    return pb.DocumentHeader(
        name=name or "",
        append_to=append_to,
        max_tokens=0 if max_tokens is None else validate.check_integer("max_tokens", max_tokens, 1, MAX_UINT32),
        pinned=validate.check_flag("pinned", pinned),
        shared=validate.check_flag("shared", shared),
    )


def upload_pieces(
    header: pb.DocumentHeader, text: DocumentText, progress: Progress | None = None
) -> Callable[[], Iterator[pb.DocumentPiece]]:
    """Return a function that begins the messages of an upload anew: the header, then pieces of `PIECE_BYTES`."""
    header = pb.DocumentHeader.FromString(header.SerializeToString())
    header.source_hash = text.source_hash

    def pieces() -> Iterator[pb.DocumentPiece]:
        yield pb.DocumentPiece(header=header)
        total = len(text.data)
        for start in range(0, total, PIECE_BYTES):
            yield pb.DocumentPiece(data=text.data[start : start + PIECE_BYTES])
            if progress is not None:
                progress("sending", min(total, start + PIECE_BYTES), total)

    return pieces


def archive_pieces(path: Path, progress: Progress | None = None) -> Callable[[], Iterator[pb.ArchivePiece]]:
    """Return a function that begins the messages of an archive's upload anew. Raises InvalidRequest: cannot be read."""
    with reading(path):
        if path.is_dir():
            raise InvalidRequest(f"{path}: is a folder: must be a file that `export` wrote")
        with path.open("rb"):
            total = path.stat().st_size

    def pieces() -> Iterator[pb.ArchivePiece]:
        sent = 0
        with reading(path), path.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                yield pb.ArchivePiece(data=data)
                sent += len(data)
                if progress is not None:
                    progress("sending", sent, total)

    return pieces


class ArchiveFile:
    """A file that gets its name once all of it has been written; a context manager that removes what is unfinished."""

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Take a path. Raises InvalidRequest when there is a file already, or nowhere to put one."""
        self.path = Path(path)
        with reading(path):
            if self.path.is_dir():
                raise InvalidRequest(f"{path}: is a folder: must be the name of a file")
            if self.path.exists() and not overwrite:
                raise InvalidRequest(f"{path}: exists: name another file, or allow it to be replaced")
            if not self.path.parent.is_dir():
                raise InvalidRequest(f"{path}: its folder does not exist")
        self._temporary: Path | None = None
        self._file: BinaryIO | None = None
        self.size = 0

    def __enter__(self) -> ArchiveFile:
        with reading(self.path):
            descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)  # of mode 0600
        self._temporary, self._file = Path(name), os.fdopen(descriptor, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def begin(self) -> None:
        """Forget what has been written."""
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Write the next bytes. Raises InvalidRequest when the disk does not take them."""
        assert self._file is not None
        with reading(self.path, "written"):
            self._file.write(data)
        self.size += len(data)

    def finish(self) -> None:
        """Give the file its name. Raises InvalidRequest."""
        assert self._file is not None
        assert self._temporary is not None
        with reading(self.path, "written"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._temporary.replace(self.path)
        self._temporary = None
