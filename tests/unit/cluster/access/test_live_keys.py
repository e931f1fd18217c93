"""Keys that change while a head runs: who has access from when on, whose calls end, and what is logged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.access.audit import AuditLog
from cluster.access.call_pool import CallEnd, Caller, CallPool
from cluster.access.keys import key_id
from cluster.access.live_keys import LiveKeys
from cluster.common.errors import PreflightError
from cluster.jobs.tenants.tenant import Tenant
from tests.support.fakes.jobs_api import write_secret
from tests.support.fakes.stage import eventually

LAW, OPS = "l" * 20, "o" * 20


class Rig:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys"
        self.write(f"law:{LAW}\nops:{OPS} admin\n")
        self.streams = CallPool(9, "the limit")
        self.audit = folder / "audit"
        self.ended: list[tuple[str, CallEnd]] = []
        self.keys = LiveKeys(self.path, self.streams, AuditLog(self.audit))

    def write(self, content: str) -> None:
        write_secret(self.path.with_name("next"), content).replace(self.path)

    def actions(self) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in self.audit.read_text().splitlines()] if self.audit.exists() else []
        return sorted((line["action"], line["subject"]) for line in lines)

    @contextlib.contextmanager
    def open(self, name: str, key: str) -> Iterator[None]:
        caller = Caller(name, "p", Tenant(name), key_id(key) if key else "")
        with self.streams.open(caller, partial(self._end, name)):
            yield

    def _end(self, name: str, reason: CallEnd, details: str) -> None:
        self.ended.append((name, reason))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_key_that_is_gone_gives_no_access_and_its_calls_end(rig: Rig) -> None:
    with rig.open("law", LAW), rig.open("ops", OPS), rig.open("host", ""):
        rig.keys.look()
        assert not rig.ended
        rig.write(f"ops:{OPS} admin\nnew:{LAW}x streams=1\n")
        rig.keys.look()
        assert rig.ended == [("law", CallEnd.REVOKED)]
        assert len(rig.streams) == 2
    assert rig.keys.tenant(LAW) is None
    assert rig.keys.tenant(f"{LAW}x") == Tenant("new", max_streams=1)
    assert rig.keys.names == {"ops", "new"}
    assert rig.actions() == [("key_added", "new"), ("key_revoked", "law")]


def test_a_call_that_was_let_in_just_before_ends_too(rig: Rig) -> None:
    rig.write(f"ops:{OPS}\n")
    rig.keys.look()
    with rig.open("law", LAW):
        rig.keys.look()
        assert rig.ended == [("law", CallEnd.REVOKED)]


def test_short_calls_end_too(rig: Rig) -> None:
    short = CallPool(9, "of short calls", can_preempt=False)
    rig.keys.watch(short)
    rig.write(f"ops:{OPS}\n")
    with short.open(Caller("law", "p", Tenant("law"), key_id(LAW)), partial(rig._end, "law")):
        rig.keys.look()
        assert rig.ended == [("law", CallEnd.REVOKED)]


def test_a_file_that_cannot_be_used_changes_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for change in (lambda: rig.write("law:short"), lambda: rig.path.chmod(0o644), rig.path.unlink):
        change()
        for _ in range(3):
            rig.keys.look()
        assert rig.keys.tenant(LAW) == Tenant("law")
    said = [record.getMessage() for record in caplog.records]
    assert [line.endswith("the keys stay as they were") for line in said] == [True] * 3
    rig.write(f"law:{LAW}\n")
    rig.keys.look()
    assert rig.keys.tenant(OPS) is None


def test_a_file_without_keys_leaves_nobody_access(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.write("# none\n")
    rig.keys.look()
    assert rig.keys.tenant(LAW) is rig.keys.tenant(OPS) is None
    assert "nobody has access" in caplog.text


def test_a_thread_looks_by_itself(rig: Rig) -> None:
    rig.keys.start()
    try:
        rig.write(f"ops:{OPS}\n")
        eventually(lambda: rig.keys.tenant(LAW) is None)
    finally:
        rig.keys.close()


def test_a_head_without_a_usable_file_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"longreach keys create NAME --file"):
        LiveKeys(write_secret(tmp_path / "keys", ""), CallPool(1, "x"), AuditLog())
