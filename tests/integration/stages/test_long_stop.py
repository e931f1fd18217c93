"""A stage that is stopped for a minute, in real time, with all that might give it up in the way: Ray, gRPC, limits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from protos.jobs.sampling import AnswerOptions

STOP_S = 60.0
IDS = [5 + i % 1000 for i in range(3000)]
ANSWER = AnswerOptions(max_tokens=20, ignore_eos=True)


@pytest.mark.slow
def test_a_minute_within_the_prediction_is_waited_for(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifteen seconds are predicted for a step, so that it is late after 75. A shard of each stage is stopped."""
    layout = "  pipeline_parallel_size: 2\n  expert_parallel_size: 2\n  cpus_per_actor: 0.5"
    with ClusterRuntime(load_deployment(write_config(layout))) as running:
        expected = running.generate([IDS], ANSWER)[0].token_ids
        monkeypatch.setattr(running.engine.latency, "predict", lambda plan: 15.0)
        (handle,) = running.submit([[7, *IDS]], ANSWER)
        time.sleep(0.2)  # inside a chunk
        stopped = [psutil.Process(running.launched.pids[at]) for at in (1, 2)]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        time.sleep(STOP_S)
        assert not handle.done.is_set()
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        assert len(handle.wait(60).token_ids) == ANSWER.max_tokens
        assert running.generate([IDS], ANSWER)[0].token_ids == expected
