"""The composition of a head: what it starts, what it leaves, and whose limits it uses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError, PreflightError
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.model import JobInput, JobSpec, JobState, ServiceBusy
from cluster.server.head import Head
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.paths import CONFIGS

SPEC = JobSpec(JobInput(token_ids=(5, 6)), AnswerOptions(max_tokens=3))


def test_start_and_close_over_a_runtime_that_goes_on(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    with FakeRuntime(tmp_path, max_queued_jobs=1) as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        head.close()  # before it was started
        head.start()
        assert sys.getswitchinterval() < before
        assert head.address == "", "no port, no listener"
        job = head.service.submit(SPEC)
        assert head.service.wait(job.id, 20).state is JobState.SUCCEEDED
        assert (tmp_path / "jobs.sqlite").is_file()
        runtime.shard.hold()
        running = [head.service.submit(SPEC)]
        with pytest.raises(ServiceBusy, match=r"server\.max_queued_jobs"):
            running += [head.service.submit(SPEC) for _ in range(3)]
        head.close()
        head.close()
        assert sys.getswitchinterval() == before
        with pytest.raises(JobStoreError):
            head.store.get(job.id)
        assert runtime.supervisor.running is not None
        runtime.shard.let(1000)
        again = Head(runtime.deployment, runtime=runtime)
        again.start()
        assert again.service.get(job.id).state is JobState.SUCCEEDED
        assert [again.service.wait(job.id, 20).restarts for job in running] == [1] * len(running)
        again.close()


def test_nothing_is_left_of_a_start_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(runtime: ClusterRuntime) -> None:
        raise PreflightError("no room")

    monkeypatch.setattr(ClusterRuntime, "_launch", refuse)
    before = sys.getswitchinterval()
    head = Head(load_deployment(CONFIGS / "single.yaml", {"data_dir": str(tmp_path / "data")}))
    with pytest.raises(PreflightError, match="no room"):
        head.start()
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {"documents", "jobs.sqlite", "jobs.sqlite.commits"}, "the store was opened first, and is closed"
    assert sys.getswitchinterval() == before
    head.close()
