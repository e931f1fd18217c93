"""Memory of this process, and load that is not its own."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from cluster.bench.planning import watch
from cluster.bench.planning.watch import OtherLoad, PeakMemory, anonymous_bytes


def test_the_peak_stays_when_memory_is_gone():
    before = anonymous_bytes(psutil.Process())
    with PeakMemory([os.getpid()]) as memory:
        block = bytearray(64 << 20)
        block[::4096] = b"x" * len(block[::4096])
        memory._sample()
        del block
    assert memory.peaks[0] >= before + (48 << 20)


@pytest.mark.parametrize(("busy", "own", "cores"), [(10.0, 10.0, 0.0), (15.0, 10.0, 0.5), (9.0, 10.0, 0.0)])
def test_what_others_use_is_what_we_do_not(monkeypatch: pytest.MonkeyPatch, busy: float, own: float, cores: float):
    clock = {"now": 0.0, "busy": 100.0, "own": 5.0}
    monkeypatch.setattr(watch, "_busy_s", lambda: clock["busy"])
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    monkeypatch.setattr(OtherLoad, "_own_s", lambda self: clock["own"])
    load = OtherLoad([])
    clock.update(now=10.0, busy=100.0 + busy, own=5.0 + own)
    assert load.cores() == cores
