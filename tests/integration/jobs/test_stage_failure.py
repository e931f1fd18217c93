"""What happens when a part of the cluster dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.common.errors import EngineError
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from protos.jobs.sampling import AnswerOptions


def test_killed_shard_fails_the_question_and_cleans_up(write_config: Callable[..., Path]) -> None:
    deployment = load_deployment(write_config("  pipeline_parallel_size: 2\n  cpus_per_actor: 0.5"))
    with ClusterRuntime(deployment) as running:
        assert running.launched is not None
        ids = [5 + i % 1000 for i in range(3500)]
        handles = running.submit([ids], AnswerOptions(max_tokens=500, ignore_eos=True))
        psutil.Process(running.launched.pids[1]).kill()
        with pytest.raises(EngineError, match="stage 1"):
            handles[0].wait(30)
        with pytest.raises(EngineError):
            running.submit([ids], AnswerOptions(max_tokens=1))
