"""What others use of the machine, told from clocks that are given."""

import os
import socket

import psutil
import pytest

from cluster.bench.speed.machine import (
    LoadOfOthers,
    busy_seconds,
    describe_machine,
    own_seconds,
    server_pids,
)


def load_of(*marks: tuple[float, float, float], cores: int = 2) -> LoadOfOthers:
    """Clocks that stand at each of (seconds, busy, own) in turn."""
    at, busy, own = (iter(column) for column in zip(*marks, strict=True))
    return LoadOfOthers(cores, clock=lambda: next(at), busy_s=lambda: next(busy), own_s=lambda more: next(own))


@pytest.mark.parametrize(
    ("busy", "own", "expected"),
    [(20.0, 20.0, 0.0), (20.0, 18.0, 0.1), (20.0, 0.0, 1.0), (10.0, 10.5, 0.0), (50.0, 0.0, 1.0)],
)
def test_others_are_what_is_not_our_own(busy: float, own: float, expected: float):
    load = load_of((5.0, 100.0, 7.0), (15.0, 100.0 + busy, 7.0 + own))
    assert load.since(load.mark()) == pytest.approx(expected)


def test_idle_time_and_guests_are_not_busy():
    times = {"user": 4.0, "nice": 1.0, "system": 2.0, "idle": 90.0, "iowait": 3.0, "steal": 0.5, "guest": 4.0}
    assert busy_seconds(times) == 7.5


def test_own_time_grows_with_work():
    before = own_seconds()
    while own_seconds() <= before:
        sum(range(20_000))


def test_own_time_counts_a_process_once_and_skips_those_that_are_gone(monkeypatch: pytest.MonkeyPatch):
    times = psutil._ntuples.pcputimes(1.0, 0.5, 2.0, 0.25, 0.0)
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda self: times)
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [])
    assert own_seconds([os.getpid(), 2**22 + 1]) == 3.75


def test_a_machine_is_described():
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > machine["available_bytes"] > 0
    assert machine["has_amx"] == ("amx_bf16" in machine["instruction_sets"])
    assert len(machine["load_average"]) == 3


def test_a_server_of_another_machine_is_not_ours():
    assert server_pids("http://192.0.2.1:8000/v1") == ()
    assert server_pids("nonsense") == ()


def test_a_server_is_found_by_its_port(monkeypatch: pytest.MonkeyPatch):
    def entry(port: int, pid: int | None, status: str = psutil.CONN_LISTEN) -> object:
        return psutil._ntuples.sconn(3, socket.AF_INET, socket.SOCK_STREAM, psutil._ntuples.addr("127.0.0.1", port), (),
                                     status, pid)  # fmt: skip

    entries = [entry(8000, 41), entry(8000, 42, psutil.CONN_ESTABLISHED), entry(8001, 43), entry(8000, None)]
    monkeypatch.setattr(psutil, "net_connections", lambda kind: entries)
    assert server_pids("http://127.0.0.1:8000/v1") == (41,)
    assert server_pids("http://localhost:8001/v1") == (43,)
