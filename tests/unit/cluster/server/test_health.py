"""What the health monitor tells, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.common import watched_thread as watched_thread_module
from cluster.server import health as health_module
from cluster.server.health import HealthMonitor
from tests.support.fakes.stage import eventually


def test_the_monitor_tells_changes_only_and_is_watched_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(watched_thread_module, "PAUSE_S", 0.01)
    part = SimpleNamespace(problem="", is_dead=False)
    told: list[str] = []
    monitor = HealthMonitor(lambda: [part], [lambda: "slow" if part.problem else ""], told.append)
    for problem in ("", "odd", "odd", "", ""):
        part.problem = problem
        monitor.check()
    assert (told, monitor.fatal) == (["odd", ""], "")
    part.is_dead, part.problem = True, "dead"
    monitor.check()
    part.is_dead, part.problem = False, ""
    monitor.check()
    assert (told[-1], monitor.fatal) == ("dead", "dead"), "the dead stay dead"

    def broken() -> str:
        raise KeyError("odd")

    monitor = HealthMonitor(list, [broken], told.append)
    monitor.start()
    eventually(lambda: bool(monitor.fatal))
    assert monitor.fatal == "the health thread has ended: KeyError: 'odd'"
    monitor.close()
