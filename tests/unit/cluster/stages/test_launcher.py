"""What the launcher says of its progress, and to shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from cluster.config.memory_budget import step_tokens
from cluster.stages.launcher import Launcher, loaded_bytes
from cluster.stages.ray_cluster import RayCluster
from cluster.stages.socket_dirs import RunDir
from protos.stage.messages import LoadProgress
from tests.support.planner.models import subject


def test_loaded_bytes_are_of_what_is_stored():
    """A quantised shard counts its weights while it loads; the last message has its bytes."""
    latest = [LoadProgress(0, 0), LoadProgress(50, 200), LoadProgress(130, 130, True)]
    assert loaded_bytes([100, 120, 128], latest) == 0 + 30 + 128


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_largest_step_is_rehearsed_on_gpus(device: str, tmp_path: Path) -> None:
    """Also where nobody asked for a context, which memory bounds then."""
    given = subject(tmp_path)
    config = given.config
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": device})})
    free = config.model_copy(update={"model": config.model.model_copy(update={"max_model_len": None})})
    asked = config.model_copy(update={"model": config.model.model_copy(update={"max_model_len": 5000})})
    for each, is_bound in ((free, True), (asked, False)):
        launcher = Launcher(replace(given, config=each), cast(RayCluster, None))
        launcher._run_dir = cast(RunDir, type("Run", (), {"path": tmp_path}))
        request = launcher._load_request(given.shards[0])
        assert request.largest_step == (step_tokens(given) if device == "cuda" else 0)
        assert request.sampled_rows == config.prefill.max_num_seqs
        assert bool(request.context_token_bytes) is is_bound
