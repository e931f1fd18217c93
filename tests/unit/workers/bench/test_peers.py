"""The runner and transformers on one small checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.bench.model import write_checkpoint
from workers.bench.peers import measure_peers


@pytest.mark.slow
def test_both_engines_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_checkpoint(tmp_path / "model", layers=1)
    figures = {figure.name: figure for figure in measure_peers(tmp_path / "model", 64, 1, [100], 1)}
    assert list(figures) == [
        "longreach, prefill 100", "longreach, decode at 100",
        "transformers, prefill 100", "transformers, decode at 100",
        "longreach / transformers, prefill 100", "longreach / transformers, decode at 100",
    ]  # fmt: skip
    assert all(figure.value > 0 for figure in figures.values())
    assert figures["longreach, prefill 100"].unit == "tokens/s"
    assert figures["longreach / transformers, decode at 100"].note == "below 1 is faster"
