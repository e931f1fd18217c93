"""Opens files that anybody may have put there, and has the system read files ahead."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path


class BadBlock(ValueError):
    """Raised for a file that is not what it should be; the message is one line."""


def open_file(path: Path) -> int:
    """Return a descriptor of a regular file; nothing is followed or waited for.

    Raises:
        BadBlock: it is something else. FileNotFoundError: there is none. OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EIO):
            raise BadBlock(f"{path.name}: {error.strerror}") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadBlock(f"{path.name}: not a regular file")
    return descriptor


def read_ahead(paths: Iterable[Path]) -> None:
    """Have the system begin to read files into the page cache, and return at once; whatever is no file is left out.

    Reads that follow one another then keep the disk busy: each alone would wait for it.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(BadBlock, OSError):
            descriptor = open_file(path)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
