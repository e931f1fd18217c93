"""What the stages `prefill` and `decode` time, rehearsed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.stage.messages import StepPlan
from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal
from workers.bench.gpu.whole.end_to_end import decode_cases, prompts, warm_up
from workers.bench.gpu.whole.model import attention_spec
from workers.model.batch import PageTables
from workers.runner.decode_graphs import DecodeGraphs, Outputs
from workers.runner.model_runner import StepOutput


def test_steps_that_decode_are_timed_as_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stage runs them: eager ones wait for their launches."""
    context = Context(Journal(tmp_path / "x", "x", True), torch.device("cpu"), time.monotonic() + 600)
    replays: list[object] = []
    run = DecodeGraphs.run

    def counted(*arguments: Any) -> Outputs:
        replays.append(1)
        return run(*arguments)

    monkeypatch.setattr(DecodeGraphs, "run", counted)
    for case in decode_cases(context):
        found = case.run(context)
        if case.name.endswith("KV"):
            assert isinstance(found, dict)
            assert found["graphs"] is True
            assert {"attention", "experts", "heads", "norms"} <= set(found["parts_ms"])
            assert len(replays) == 4, "all steps that are timed"
            return
    pytest.fail("no step is timed")


def test_what_is_timed_was_compiled_before(tmp_path: Path) -> None:
    """Rows behind two DCA chunks take other builds of kernels than the first two steps of a prompt."""
    context = Context(Journal(tmp_path / "x", "x"), torch.device("cpu"), time.monotonic() + 600)
    regions: list[int] = []

    class Planned:
        """A runner that computes nothing."""

        def reset(self) -> None:
            self.tables = PageTables(context.sizes.page)

        def execute(self, plan: StepPlan, keep_logits: bool = False) -> StepOutput:
            self.tables.apply(plan)
            regions.append(len(self.tables.batch(plan, spec, context.device).regions))
            return StepOutput()

    for one, _ in prompts(context):
        if one.chunks:
            spec = attention_spec(context, one.sparse, True)
            regions.clear()
            warm_up(context.sizes, Planned(), [7] * one.length, context.sizes.step, one)  # type: ignore[arg-type]
            assert regions == [1, 1, 3], one.name
