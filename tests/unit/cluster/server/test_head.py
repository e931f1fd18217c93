"""The composition of a head: what it starts, what it leaves, and whose limits it uses."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.access.key_file import KeyFile
from cluster.common.errors import JobStoreError, PreflightError
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.model import JobInput, JobSpec, JobState, ServiceBusy
from cluster.jobs.sqlite.commit_mark import CommitMark
from cluster.jobs.store import JobStore
from cluster.jobs.tenants.tenant import Tenant
from cluster.server.head import Head
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
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
        assert {again.service.wait(job.id, 20).state for job in running} == {JobState.SUCCEEDED}
        again.close()


def test_keys_of_a_running_head_are_those_of_the_file(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys")
    key = file.create(Tenant("law"))
    with FakeRuntime(tmp_path / "data") as runtime:
        config = runtime.deployment.config
        security = config.security.model_copy(update={"api_keys_file": tmp_path / "keys"})
        deployment = replace(runtime.deployment, config=config.model_copy(update={"security": security}))
        head = Head(deployment, runtime=runtime)
        head.start()
        keys = head._keys
        assert keys is not None
        assert keys.tenant(key) == Tenant("law")
        file.revoke("law")
        eventually(lambda: keys.tenant(key) is None)
        assert not keys.thread.is_dead
        head.close()
    assert "key_revoked" in (tmp_path / "data" / "log" / "audit.jsonl").read_text()


def test_a_port_that_is_taken_while_the_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before jobs are taken up: they wait for a head that can be reached."""
    free = [True, True, False]  # gRPC and metrics at first, then gRPC

    def check_port(host: str, port: int) -> None:
        if not free.pop(0):
            raise PreflightError("server.port: taken")

    with FakeRuntime(tmp_path) as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        head.start()
        runtime.shard.hold()
        job = head.service.submit(SPEC)
        eventually(lambda: head.service.get(job.id).state is not JobState.QUEUED)
        head.close()
        runtime.shard.let(1000)
        monkeypatch.setattr("cluster.server.head.check_port", check_port)
        with pytest.raises(PreflightError, match="taken"):
            Head(runtime.deployment, runtime=runtime).start()
        monkeypatch.undo()
        again = Head(runtime.deployment, runtime=runtime)
        again.start()
        assert again.service.wait(job.id, 20).restarts == 1
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


def store_of_a_later_version(data: Path) -> None:
    JobStore(data / "jobs.sqlite").close()
    with closing(sqlite3.connect(data / "jobs.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = 999 WHERE key = 'schema_version'")


def documents_are_a_file(data: Path) -> None:
    data.mkdir()
    (data / "documents").write_text("x")


def store_is_a_folder(data: Path) -> None:
    (data / "jobs.sqlite").mkdir(parents=True)


def data_is_a_file(data: Path) -> None:
    data.write_text("x")


def data_leads_nowhere(data: Path) -> None:
    data.symlink_to("nowhere")


def mark_is_a_folder(data: Path) -> None:
    (data / "jobs.sqlite.commits").mkdir(parents=True)


@pytest.mark.parametrize(
    "damage",
    [
        store_of_a_later_version, documents_are_a_file, store_is_a_folder, data_is_a_file, data_leads_nowhere,
        mark_is_a_folder,
    ],
)  # fmt: skip
def test_a_store_that_cannot_be_used_is_refused_before_any_weight_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    def launch(runtime: ClusterRuntime) -> None:
        raise AssertionError("the cluster was started")

    monkeypatch.setattr(ClusterRuntime, "_launch", launch)
    damage(tmp_path / "data")
    head = Head(load_deployment(CONFIGS / "single.yaml", {"data_dir": str(tmp_path / "data")}))
    with pytest.raises(JobStoreError) as caught:
        head.start()
    assert "\n" not in str(caught.value)
    head.close()


def test_what_is_lost_is_passed_on(tmp_path: Path) -> None:
    mark = CommitMark(tmp_path / "jobs.sqlite")
    mark.set(5, 70)
    mark.close()
    warnings: list[str] = []
    with FakeRuntime(tmp_path) as runtime:
        head = Head(runtime.deployment, runtime=runtime, on_warning=warnings.append)
        head.start()
        head.close()
    assert len(warnings) == 1
    assert "another database than the last head used, which had 70 commits" in warnings[0]


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
