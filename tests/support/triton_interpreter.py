"""Run the cases of a test module in Triton's interpreter: in a process of its own, which reads the variable once.

A module has its cases in classes with `__test__ = INTERPRETED`, builds in classes with `__test__ = not INTERPRETED`,
and one test that calls `run_cases(__file__)`, which a kernel that leaves its tensors fails instead of ending pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_cases(path: str) -> None:
    """Run a test module with the interpreter and fail with its output if a case fails or the process crashes."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
