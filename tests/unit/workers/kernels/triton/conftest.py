"""Kernels of Triton run in its interpreter here, every test module in a process of its own.

The interpreter must be chosen before a kernel is imported, and an address out of range ends the process. The modules in
`compiled/` are ordinary ones. To see single tests: `TRITON_INTERPRET=1 python -m pytest FILE`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_VARIABLE = "TRITON_INTERPRET"
_TIMEOUT_S = 300


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if os.environ.get(_VARIABLE) == "1" or module_path.parent != Path(__file__).parent:
        return None
    return _Module.from_parent(parent, path=module_path)


class _Module(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield _Process.from_parent(self, name="in_the_interpreter")


class _Process(pytest.Item):
    def runtest(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(self.path)]
        environment = {**os.environ, _VARIABLE: "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            cwd=self.config.rootpath,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"exit code {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}", pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name
