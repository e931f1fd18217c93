"""Files of documents, read and written as a whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_file(path: Path, size: int) -> bytes:
    """Return the content of a regular file, but not more than one byte beyond `size`; others raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe in its place must not block
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(size + 1)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, piece: bytes) -> None:
    """Write all bytes."""
    rest = memoryview(piece)
    while rest:  # a disk that fills up accepts a part first
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Let names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
