"""What the stages `prefill` and `decode` time, rehearsed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal
from workers.bench.gpu.whole.end_to_end import decode_cases
from workers.runner.decode_graphs import DecodeGraphs


def test_steps_that_decode_are_timed_as_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stage runs them: eager ones wait for their launches."""
    context = Context(Journal(tmp_path / "x", "x", True), torch.device("cpu"), time.monotonic() + 600)
    replays: list[object] = []
    run = DecodeGraphs.run
    monkeypatch.setattr(DecodeGraphs, "run", lambda *arguments: replays.append(1) or run(*arguments))
    for case in decode_cases(context):
        found = case.run(context)
        if case.name.endswith("KV"):
            assert isinstance(found, dict)
            assert found["graphs"] is True
            assert {"attention", "experts", "heads", "norms"} <= set(found["parts_ms"])
            assert len(replays) == 4, "all steps that are timed"
            return
    pytest.fail("no step is timed")
