"""Stages that wait instead of computing: the real transport, scheduler and service under times of other hardware.

The environment variable `LONGREACH_PACE` names a JSON file with the seconds of chunks by stage,
`{"0": {"2048:1024": 0.12}}` for 1,024 tokens from position 2,048 on at stage 0. Only benchmarks set it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from protos.stage.messages import StepPlan
from workers.runner.model_runner import ModelRunner, PreparedStep, StepOutput

VARIABLE = "LONGREACH_PACE"


def read_pace(stage: int) -> Mapping[str, float] | None:
    """Return the seconds of chunks of a stage; None where stages compute. Raises ValueError: the file is no such."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        seconds = json.loads(Path(path).read_text())[str(stage)]
        return {str(chunk): float(value) for chunk, value in seconds.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{VARIABLE}: {path}: has no times of stage {stage} ({error!r})") from error


class PacedRunner(ModelRunner):
    """Takes the time of every chunk that has one, and computes nothing: states are zeros, and so is every token."""

    def __init__(self, *arguments: Any, seconds: Mapping[str, float]) -> None:
        """Args: `seconds` by chunk, "START:LENGTH"; the others are those of `ModelRunner`."""
        super().__init__(*arguments)
        self._seconds = seconds

    def seconds_of(self, plan: StepPlan) -> float:
        """Return how long a step takes."""
        return sum(self._seconds.get(f"{part.start}:{part.length}", 0.0) for part in plan.slices)

    @torch.inference_mode()
    def compute(
        self, prepared: PreparedStep, hidden: torch.Tensor | None = None, keep_logits: bool = False
    ) -> StepOutput:
        """Wait as long as the step takes; see `ModelRunner.compute`."""
        plan = prepared.plan
        time.sleep(self.seconds_of(plan))
        if not self.shard.is_last:
            return StepOutput(torch.zeros(plan.num_tokens, self.hidden_size, dtype=self.dtype, device=self.device))
        logits = torch.zeros(self._spec.vocab_size)
        samples = tuple(
            self._sampler.sample(part.sequence, logits, part.sample) for part in plan.slices if part.sample is not None
        )
        tokens = tuple(sample.token_id for sample in samples)
        if self.shard.is_first:
            self.set_newest((sample.sequence for sample in samples), tokens)
        return StepOutput(samples=samples if self._collectives.rank == 0 else (), tokens=tokens)
