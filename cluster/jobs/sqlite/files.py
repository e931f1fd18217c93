"""The files of a job store on disk: private, writable, and the same ones for as long as the store is open."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from pathlib import Path

from cluster.common.errors import JobStoreError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_SUFFIXES = ("", "-wal", "-shm")
_REMEDIES = {  # by the beginning of SQLite's name of an error
    "SQLITE_FULL": "free space on its disk",
    "SQLITE_BUSY": "another process uses it: try again, or end that process",
    "SQLITE_LOCKED": "another process uses it: try again, or end that process",
    "SQLITE_CORRUPT": "the file is damaged: restore a copy of it, or name another file",
    "SQLITE_READONLY_DBMOVED": "put it back, or start the head again",
    "SQLITE_NOTADB": "the file is damaged or something else: restore a copy of it, or name another file",
}


def remedy(name: str) -> str:
    """Return what to do about an error of SQLite, by its name."""
    for begin, way_out in _REMEDIES.items():
        if name.startswith(begin):
            return way_out
    return "check its disk and its permissions, or name another file"


def make_private(path: Path) -> None:
    """Create the file with mode 0600 before SQLite opens it; its `-wal` and `-shm` files get the same mode.

    Raises:
        JobStoreError: it is no file, may not be written, or was emptied. OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_writable(path.parent):
        raise JobStoreError(f"job store {path}: its folder is read-only: must be one that we may write")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if not path.is_file():
            raise JobStoreError(f"job store {path}: must be a file: name another one") from None
        for suffix in _SUFFIXES:
            one = path.with_name(path.name + suffix)
            if one.exists() and not _is_writable(one):
                raise JobStoreError(f"job store {one}: is read-only: must be a file that we may write") from None
        log = path.with_name(f"{path.name}-wal")
        if not path.stat().st_size and log.exists() and log.stat().st_size:
            raise JobStoreError(
                f"job store {path}: 0 bytes beside a write-ahead log: it was cut off: restore a copy of it, or move "
                f"{log.name} away to begin a new one"
            ) from None
        if stat.S_IMODE(path.stat().st_mode) != 0o600:
            path.chmod(0o600)  # by name: closing a second descriptor would drop SQLite's locks of this process


def _is_writable(path: Path) -> bool:
    """Whether a file or folder may be written, and is meant to be: root may write anything."""
    return os.access(path, os.R_OK | os.W_OK) and bool(path.stat().st_mode & 0o222)


class StoreFiles:
    """What the open files of a store are called on disk; `check` notices when others have those names."""

    def __init__(self, path: Path) -> None:
        """Remember the files of a store that is open (OSError: one is missing)."""
        self._path = path
        self._size = path.stat().st_size  # it never becomes smaller
        self._files = [(str(path) + suffix, _identity(os.stat(str(path) + suffix))) for suffix in _SUFFIXES]

    def check(self) -> None:
        """Raise the error of SQLite for a file that was removed, replaced or cut off; three calls of the system."""
        for name, identity in self._files:
            try:
                found = os.stat(name)
            except OSError as error:
                raise _moved(f"{os.path.basename(name)} was removed while in use ({error.strerror})") from error
            if _identity(found) != identity:
                raise _moved(f"{os.path.basename(name)} was replaced while in use")
            if name == str(self._path) and found.st_size < self._size:
                raise _moved(f"it was cut off from {self._size} to {found.st_size} bytes while in use")


def _moved(problem: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(problem)
    error.sqlite_errorname = "SQLITE_READONLY_DBMOVED"  # SQLite notices it in some cases itself
    return error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
