"""How many commits a job store should have, in a file beside it: a write-ahead log that is lost is noticed by it.

SQLite takes up what it finds in the log and drops the rest without a word: a log that was removed, cut off or smashed,
or a database that was replaced by an older copy, looks like one in which nothing has happened since.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.common.errors import JobStoreError

_WIDTH = 20  # digits of a number: the file is overwritten in place and keeps its length


class CommitMark:
    """The mark of one job store: its number, and how many commits it had when it was last written to."""

    def __init__(self, database: Path) -> None:
        """Open or create the mark of a database. Raises JobStoreError."""
        self._path = database.with_name(f"{database.name}.commits")
        self._database = database
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JobStoreError(f"{self._path}: {error.strerror}: must be a file that we may write") from error

    def loss(self, store: int, commits: int) -> str:
        """Return what is missing in a database that has this number and so many commits, as one line; "" if nothing."""
        try:
            marked_store, marked = map(int, os.pread(self._descriptor, 3 * _WIDTH, 0).split())
        except (OSError, ValueError):
            return ""  # there was none, or it is damaged: nothing is known
        if marked_store != store:
            return (
                f"job store {self._database}: another database than the last head used, which had {marked} commits: "
                "its jobs are not in this one"
            )
        if marked <= commits:
            return ""
        return (
            f"job store {self._database}: its last {marked - commits} commits of {marked} are lost: the write-ahead log"
            f" {self._database.name}-wal was removed or damaged, or the file is an older copy: jobs of that time are"
            " missing, or go on from an earlier token"
        )

    def set(self, store: int, commits: int) -> None:
        """Note so many commits, which are in the database; may raise OSError."""
        os.pwrite(self._descriptor, f"{store:{_WIDTH}d} {commits:{_WIDTH}d}\n".encode(), 0)

    def close(self) -> None:
        """Close the file, which stays; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
