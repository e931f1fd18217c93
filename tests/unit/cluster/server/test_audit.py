"""Who is named in the log, for what, and how often; with real calls it is in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.access.call_pool import Caller
from cluster.server.audit import Callers, RefusalLog, log_change
from cluster.server.security import ApiKeys

KEY = "0123456789abcdef"
JOBS = "/longreach.jobs.v1.Jobs"


def context(peer: str, *authorization: str) -> SimpleNamespace:
    metadata = [("authorization", value) for value in authorization]
    return SimpleNamespace(peer=lambda: peer, invocation_metadata=lambda: metadata)


@pytest.mark.parametrize(
    ("peer", "given", "name"),
    [
        ("ipv4:10.0.0.1:5000", [f"Bearer {KEY}"], "key team a"),
        ("ipv4:10.0.0.1:5000", [], "ipv4:10.0.0.1"),
        ("ipv4:10.0.0.1:5000", ["Bearer wrong"], "ipv4:10.0.0.1"),
        ("ipv4:10.0.0.1:5000", [f"Bearer {KEY}"] * 2, "ipv4:10.0.0.1"),
        ("ipv6:%5B::1%5D:5000", [], "ipv6:%5B::1%5D"),
        ("unix:", [], "unix:"),
    ],
)
def test_callers(peer: str, given: list[str], name: str) -> None:
    caller = Callers(ApiKeys({KEY: "team a"})).identify(context(peer, *given))  # type: ignore[arg-type]
    assert (caller.name, caller.peer) == (name, peer)


def test_without_keys_callers_are_hosts() -> None:
    caller = Callers(None).identify(context("ipv4:10.0.0.1:5000", f"Bearer {KEY}"))  # type: ignore[arg-type]
    assert str(caller) == "ipv4:10.0.0.1 at ipv4:10.0.0.1:5000"


def test_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    caller = Caller("key team a", "ipv4:10.0.0.1:5000")
    request, reply = SimpleNamespace(id="doc_1\nforged"), SimpleNamespace(id="job_1")
    for method in (
        "Submit",
        "UploadDocument",
        "AppendDocument",
        "ImportDocument",
        "PinDocument",
        "Cancel",
        "Delete",
        "DeleteDocument",
        "CountTokens",
        "ExportDocument",
        "Get",
        "List",
        "Stream",
    ):
        log_change(f"{JOBS}/{method}", caller, request, reply)
    log_change("/other.Service/Submit", caller, request, reply)
    who = "by key team a at ipv4:10.0.0.1:5000"
    assert [record.getMessage() for record in caplog.records] == [
        f"Submit job_1 {who}", f"UploadDocument job_1 {who}", f"AppendDocument job_1 {who}",
        f"ImportDocument job_1 {who}",
        rf"PinDocument doc_1\nforged {who}", rf"Cancel doc_1\nforged {who}",
        rf"Delete doc_1\nforged {who}", rf"DeleteDocument doc_1\nforged {who}",
    ]  # fmt: skip


def test_refusals_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = RefusalLog(lambda: now)
    for _ in range(1000):
        log.add("ipv4:10.0.0.1:5000", f"{JOBS}/Get\n")
    now += 10
    log.add("ipv4:10.0.0.2:5000", "/x" * 1000)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == rf"refused {JOBS}/Get\n from ipv4:10.0.0.1:5000: no valid API key"
    assert second.endswith("from ipv4:10.0.0.2:5000: no valid API key; 999 more since the last line")
    assert len(second) < 250
