"""Writes that wait for a store that cannot take them now: locked by another process, or on a full disk."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from typing import TypeVar

from cluster.common.errors import JobStoreError

RETRY_S = 1.0  # between attempts
_LOG_EVERY = 60  # attempts
# of SQLite: the same write fails the same way again; all else passes by itself or when somebody makes room
_LASTING = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CONSTRAINT", "SQLITE_MISMATCH", "SQLITE_TOOBIG", "SQLITE_ERROR")
_LASTING_TYPES = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class StoreAbandoned(JobStoreError):
    """What was waited for is not written: this head ends, and the next one does it."""


def may_pass(error: BaseException) -> bool:
    """Whether the store may take later what it refused with this error."""
    cause = error.__cause__
    if not isinstance(error, JobStoreError) or not isinstance(cause, sqlite3.Error):
        return False
    return not (isinstance(cause, _LASTING_TYPES) or getattr(cause, "sqlite_errorname", "").startswith(_LASTING))


class StoreRetry:
    """Repeats what the store refuses for a while."""

    def __init__(self, closing: threading.Event, problem: Callable[[], str] = lambda: "") -> None:
        """
        Args:
            closing: set when this head ends.
            problem: what is wrong with the store as a whole ("": nothing); no write is tried meanwhile.
        """
        self._closing = closing
        self._problem = problem

    def __call__(self, action: Callable[[], _T]) -> _T:
        """Return what `action` returns, which must be safe to repeat.

        Raises:
            StoreAbandoned: the head ends before. And whatever `action` raises that will not pass.
        """
        attempt = 0
        while True:
            reason: object = self._problem()
            if not reason:
                try:
                    return action()
                except JobStoreError as error:
                    if not may_pass(error) and not self._problem():
                        raise
                    reason = error
            if attempt % _LOG_EVERY == 0:
                _log.error("%s; trying again until it works", reason)
            attempt += 1
            if self._closing.wait(RETRY_S):
                raise StoreAbandoned(f"{reason}; left to the next head")
