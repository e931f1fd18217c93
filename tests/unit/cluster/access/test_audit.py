"""What the audit log says, how often, and where."""

from __future__ import annotations

import json
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.access import audit as audit_module
from cluster.access.audit import AuditLog
from cluster.access.call_pool import Caller
from cluster.jobs.tenants.tenant import ANYONE, Tenant

LAW = Caller("key law", "ipv4:10.0.0.1:5000", Tenant("law"), "0011223344556677")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_changes_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "log" / "audit.jsonl"
    log = AuditLog(path)
    log.note(LAW, "submit", "job_1")
    log.note(Caller("ipv4:127.0.0.1", "ipv4:127.0.0.1:7", ANYONE), "cancel", "job_2\nforged")
    log.note_key("key_revoked", "law")
    log.close()
    found = lines(path)
    times = [datetime.fromisoformat(line.pop("time")) for line in found]
    assert times == sorted(times)
    assert found == [
        {"action": "submit", "subject": "job_1", "key": "law", "peer": "ipv4:10.0.0.1:5000"},
        {"action": "cancel", "subject": "job_2\nforged", "peer": "ipv4:127.0.0.1:7"},
        {"action": "key_revoked", "subject": "law"},
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_refusals_are_logged_now_and_then(tmp_path: Path) -> None:
    now = 100.0
    log = AuditLog(tmp_path / "audit", lambda: now)
    for _ in range(1000):
        log.refuse("ipv4:10.0.0.1:5000", "/longreach.jobs.v1.Jobs/Get\n")
    now += 10
    log.refuse("ipv4:10.0.0.2:5000", "/x" * 1000)
    first, second = lines(tmp_path / "audit")
    assert (first["action"], first["subject"]) == ("key_refused", "/longreach.jobs.v1.Jobs/Get\n")
    assert "left_out" not in first
    assert (second["left_out"], len(second["subject"])) == (999, 100)


def test_files_are_bounded_and_the_older_ones_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit_module, "_MAX_BYTES", 1000)
    monkeypatch.setattr(audit_module, "_KEPT", 2)
    log = AuditLog(tmp_path / "audit")
    for number in range(100):
        log.note(LAW, "submit", f"job_{number}")
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit", "audit.1", "audit.2"]
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 1000
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert lines(tmp_path / "audit")[-1]["subject"] == "job_99"


def test_without_a_path_nothing_is_written() -> None:
    log = AuditLog()
    log.note(LAW, "submit", "job_1")
    log.refuse("a", "b")
    log.close()
