"""Steps that real heads have measured, for the latency model to learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cluster.latency.model import LatencyModel
from protos.jobs.sampling import SamplingParams
from protos.stage.messages import CellReport, SampleSpec, SequenceSlice, StepPlan


class Step(NamedTuple):
    """One slice and its seconds; `share` of the causal pairs were visited, None: all."""

    start: int
    length: int
    prompt_len: int
    samples: int
    seconds: float
    share: float | None

    def teach(self, model: LatencyModel) -> None:
        """Let a model observe the step."""
        sample = SampleSpec(SamplingParams(), 0) if self.samples else None
        part = SequenceSlice(1, self.start, self.length, self.prompt_len, (), (), 1, sample)
        report = CellReport(1, 0, 0, self.start, self.length, (self.share or 1.0,), (1.0,), (1.0,), (False,))
        model.observe(StepPlan(1, (part,)), self.seconds, [report] if self.share is not None else [])


def recorded(name: str) -> dict[str, Any]:
    """Return the content of a file of this folder; `what` says what it is, `steps` are `Step`s."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    return content | {"steps": [Step(*step) for step in content["steps"]]}
