"""Checks of quantised products run in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interpreted import interpreted_module


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return interpreted_module(module_path, parent) if module_path.name == "test_quantised.py" else None
