"""Limits that a child process sets for itself."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import ROOT

PROGRAM = """
import resource, sys
from cluster.common.child_limits import limit_resources
limit_resources(512 << 20, 32, cpu_seconds=7)
for name in ("AS", "CORE", "FSIZE", "NOFILE", "CPU"):
    print(*resource.getrlimit(getattr(resource, f"RLIMIT_{name}")))
try:
    bytes(1 << 30)
except MemoryError:
    print("no memory")
"""


def test_limits_hold() -> None:
    out = subprocess.check_output([sys.executable, "-c", PROGRAM], cwd=ROOT, text=True)
    size = 512 << 20
    assert out.splitlines() == [f"{size} {size}", "0 0", "0 0", "32 32", "7 7", "no memory"]
