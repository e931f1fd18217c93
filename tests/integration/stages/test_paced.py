"""A real cluster whose stages wait: as long as simulated or longer, and the environment is as before."""

from __future__ import annotations

import os

from cluster.bench.simulation.real import check_processes
from cluster.latency.hardware import load_hardware
from cluster.planner.target import gpu_target
from tests.support.paths import NEEDLE
from workers.runner.paced import VARIABLE


def test_processes_wait_as_long_as_is_simulated() -> None:
    said: list[str] = []
    row = check_processes(NEEDLE, gpu_target(load_hardware(), "h200").costs_of, 4096, 1024, 4, 1, said.append)
    assert row["simulated_s"] > 0.3, "7 turns of about 0.1 s"
    assert row["measured_s"][0] >= 0.98 * row["simulated_s"]
    assert 0.2 < row["bubbles"] < 0.7
    assert said[0].startswith("4 processes that wait: ")
    assert VARIABLE not in os.environ
