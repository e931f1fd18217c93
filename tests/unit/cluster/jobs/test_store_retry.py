"""What the store refuses for a while is repeated; what it refuses for good is not."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs import store_retry as module
from cluster.jobs.model import InvalidJob
from cluster.jobs.store import JobStore
from cluster.jobs.store_retry import StoreAbandoned, StoreRetry, may_pass
from tests.support.fakes.stage import eventually


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)


def refused(cause: BaseException | None, name: str = "") -> JobStoreError:
    error = JobStoreError("refused")
    error.__cause__ = cause
    if name and cause is not None:
        cause.sqlite_errorname = name  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (refused(sqlite3.OperationalError("locked"), "SQLITE_BUSY"), True),
        (refused(sqlite3.OperationalError("full"), "SQLITE_FULL"), True),
        (refused(sqlite3.OperationalError("disk"), "SQLITE_IOERR_WRITE"), True),
        (refused(sqlite3.OperationalError("read-only"), "SQLITE_READONLY"), True),
        (refused(sqlite3.OperationalError("no name")), True),
        (refused(sqlite3.DatabaseError("malformed"), "SQLITE_CORRUPT_VTAB"), False),
        (refused(sqlite3.DatabaseError("not one"), "SQLITE_NOTADB"), False),
        (refused(sqlite3.IntegrityError("unique"), "SQLITE_CONSTRAINT_UNIQUE"), False),
        (refused(sqlite3.OperationalError("no such table"), "SQLITE_ERROR"), False),
        (refused(sqlite3.ProgrammingError("closed")), False),
        (refused(OSError("a document")), False),
        (refused(None), False),
        (InvalidJob("bad"), False),
        (sqlite3.OperationalError("ours"), False),
    ],
    ids=str,
)
def test_what_may_pass(error: BaseException, passes: bool) -> None:
    assert may_pass(error) is passes
    calls: list[int] = []

    def action() -> int:
        calls.append(1)
        if len(calls) < 4:
            raise error
        return 7

    if passes:
        assert StoreRetry(threading.Event())(action) == 7
    else:
        with pytest.raises(type(error)):
            StoreRetry(threading.Event())(action)
        assert len(calls) == 1


def test_the_end_of_the_head_ends_the_wait() -> None:
    closing = threading.Event()

    def action() -> None:
        closing.set()
        raise refused(sqlite3.OperationalError("locked"))

    with pytest.raises(StoreAbandoned, match="left to the next head"):
        StoreRetry(closing)(action)


def test_nothing_is_written_while_the_store_as_a_whole_cannot_be_used() -> None:
    problem, done = ["removed"], threading.Event()
    retry = StoreRetry(threading.Event(), lambda: problem[0])
    thread = threading.Thread(target=lambda: retry(done.set))
    thread.start()
    assert not done.wait(0.1)
    problem[0] = ""
    assert done.wait(20)
    thread.join()


def test_a_write_waits_for_another_process_until_it_is_told_not_to(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    errors: list[BaseException] = []

    def write(action: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                action()
            except JobStoreError as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    first = write(lambda: store.touch_document("doc_1", 1.0))
    first.join(0.2)
    assert first.is_alive()
    other.execute("COMMIT")
    first.join(5)
    assert not first.is_alive()
    assert not errors
    other.execute("BEGIN EXCLUSIVE")
    second = write(lambda: store.touch_document("doc_1", 1.0))
    second.join(0.2)
    assert second.is_alive()
    store.stop_waiting()
    second.join(1)
    eventually(lambda: bool(errors))
    assert may_pass(errors[0])
    other.close()
    store.close()
