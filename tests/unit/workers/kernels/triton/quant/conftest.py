"""The modules of this folder run in Triton's interpreter; those in `compiled` compile kernels for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interpreted import interpreted_module


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return interpreted_module(module_path, parent) if module_path.parent == Path(__file__).parent else None
