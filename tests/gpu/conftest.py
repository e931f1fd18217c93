"""These tests need a CUDA device; without one they are skipped, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; pytest hands over those of all others too."""
    if not torch.cuda.is_available():
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
