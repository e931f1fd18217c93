"""Test modules that run kernels of Triton in its interpreter, each in a process of its own.

The interpreter must be chosen (`TRITON_INTERPRET=1`) before a kernel is imported, and an address out of range ends the
process. A conftest returns `interpreted_module` for such a module from `pytest_pycollect_makemodule`. Fresh memory,
which is often 0 on a CPU and never on a GPU, is NaN there or the largest integer. To run single tests of it:
`TRITON_INTERPRET=1 python -m pytest --noconftest -p tests.support.interpreted FILE`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

_VARIABLE = "TRITON_INTERPRET"
# importing pytest's other plugins takes longer than all else at the start of such a process
_ENVIRONMENT = {_VARIABLE: "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_TIMEOUT_S = 570  # below that of a test


def interpreted_module(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Return a module of one test that runs the whole module in the interpreter; None in that process itself."""
    return None if os.environ.get(_VARIABLE) == "1" else _Module.from_parent(parent, path=module_path)


def pytest_configure() -> None:
    """Fill the memory that `torch.empty` returns; this module is a plugin of pytest in that process."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if importlib.util.find_spec("triton") is not None:
        _speed_up()


def _speed_up() -> None:
    """Do once what the interpreter does at every call of a function, or for every value.

    It replaces the functions of the language by its own, which are the same each time, and looks up types in a table
    which it makes for that.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_type(kind: Any) -> Any:
        name = kind.element_ty.name if isinstance(kind, tl.block_type) else kind.name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    interpreter._get_np_dtype = numpy_type


class _Module(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        item = _Process.from_parent(self, name="in_the_interpreter")
        item.add_marker(pytest.mark.slow)
        yield item


class _Process(pytest.Item):
    def runtest(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", __name__, str(self.path)]
        done = subprocess.run(
            command, env={**os.environ, **_ENVIRONMENT}, cwd=self.config.rootpath, capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"exit code {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}", pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name
