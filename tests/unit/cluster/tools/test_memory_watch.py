"""Memory of a process tree."""

from __future__ import annotations

import subprocess
import sys
import time

from cluster.tools.memory_watch import MemoryWatch, tree_pss_bytes

MIB = 1 << 20


def test_memory_of_a_child_counts_and_the_peak_stays():
    before = tree_pss_bytes()
    assert before > 5 * MIB
    with MemoryWatch(every_s=0.05) as watch:
        code = "data = bytearray(b'x') * (64 << 20); print('up', flush=True); input()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        deadline = time.monotonic() + 20
        while watch.peak_bytes < before + 60 * MIB and time.monotonic() < deadline:
            time.sleep(0.05)
        child.communicate("\n")
    assert before + 60 * MIB < watch.peak_bytes < before + 200 * MIB
    assert tree_pss_bytes() < before + 60 * MIB
