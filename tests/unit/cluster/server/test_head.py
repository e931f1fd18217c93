"""The composition of a head: what it starts, what it leaves, and whose limits it uses."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
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
    assert not (tmp_path / "data").exists()
    assert sys.getswitchinterval() == before
    head.close()


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_jump_of_the_machines_clock_changes_no_promise(
    tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeRuntime(tmp_path, result_ttl_s=7200.0, document_ttl_s=7200.0) as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        head.start()
        service, now = head.service, time.time
        document = service.documents.put("a", [b"text"], 100)
        ended = service.submit(SPEC).id
        assert service.wait(ended, 20).state is JobState.SUCCEEDED
        runtime.shard.hold()
        late = service.submit(replace(SPEC, deadline=service.now() + 3600.0)).id
        attached = service.submit(replace(SPEC, attached=True)).id
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        soon = service.submit(replace(SPEC, deadline=service.now() + 0.3)).id
        assert service.wait(soon, 20).error == "deadline exceeded"
        service._sweep(service.now())
        assert [service.get(id).state.is_final for id in (ended, late, attached)] == [True, False, False]
        assert service.documents.get(document.id) == document
        assert 0 <= service.status()["uptime_s"] < 60
        assert service.wait(ended, 0).finished == pytest.approx(now(), abs=60)
        head.close()
