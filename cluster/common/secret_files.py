"""Files with secrets and certificates: read in bounds, and refused where others may read or replace them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cluster.common.errors import PreflightError

_MAX_BYTES = 1 << 20


def read_secret(what: str, path: Path) -> bytes:
    """Return the content of a file that only its owner and group may read, and nobody else replace.

    Raises:
        PreflightError.
    """
    content, mode = _read(what, path)
    if mode & 0o007:
        shown = oct(stat.S_IMODE(mode))[2:]
        raise PreflightError(f"{what}: {path}: mode {shown}: must not be open to others; chmod 600 {path}")
    for folder in dict.fromkeys((path.absolute().parent, path.resolve().parent)):  # of the link, and of its file
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            shown = oct(stat.S_IMODE(mode))[2:]
            raise PreflightError(
                f"{what}: {path}: mode {shown} of {folder}: others could replace the file; chmod o-w {folder}"
            )
    return content


def read_public(what: str, path: Path) -> bytes:
    """Return the content of a file that anybody may read. Raises PreflightError."""
    return _read(what, path)[0]


def _read(what: str, path: Path) -> tuple[bytes, int]:
    """Return content and mode of a regular file of at most `_MAX_BYTES`. Raises PreflightError."""
    try:
        # not blocking: a pipe without a writer would be waited for
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of the open file: no exchange in between
            if not stat.S_ISREG(mode):
                raise PreflightError(f"{what}: {path}: cannot be read: must be a regular file")
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise PreflightError(f"{what}: {path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise PreflightError(f"{what}: {path}: must be at most {_MAX_BYTES} bytes")
    return content, mode
