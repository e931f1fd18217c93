"""No thread of a head ends unnoticed: health checks, the status and the end of the head say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.client import Client
from cluster.common import watched_thread as watched_thread_module
from cluster.common.errors import JobStoreError
from cluster.engine import supervisor as supervisor_module
from cluster.jobs.model import JobInput, JobSpec, JobState
from cluster.jobs.recorder import Recorder
from cluster.jobs.service import JobService
from cluster.server import health as health_module
from cluster.server.head import Head
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.head import free_port

SPEC = JobSpec(JobInput(token_ids=(5, 6)), AnswerOptions(max_tokens=3))
SERVING = health_pb2.HealthCheckResponse.SERVING


class Served:
    """A head over a fake runtime with both ports, and what its clients see of its health."""

    def __init__(self, folder: Path) -> None:
        self.runtime = FakeRuntime(folder, metrics_port=free_port())
        self.runtime.start()
        self.head = Head(self.runtime.deployment, runtime=self.runtime, port=0)
        self.head.start()
        self.service = self.head.service
        self._channel = grpc.insecure_channel(self.head.address)

    @property
    def is_serving(self) -> bool:
        stub = health_pb2_grpc.HealthStub(self._channel)
        return bool(stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING)

    def close(self) -> None:
        self._channel.close()
        self.head.close()
        self.runtime.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(health_module, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(watched_thread_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0,) * 5)
    made = Served(tmp_path)
    yield made
    made.close()


def raising(times: int, original: Callable[..., Any]) -> Callable[..., Any]:
    left = [times]

    def run(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise KeyError("injected")
        return original(*arguments)

    return run


def break_recorder(served: Served, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    monkeypatch.setattr(Recorder, "_commit_first", raising(times, Recorder._commit_first))
    served.service.submit(SPEC)


def break_timer(served: Served, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    monkeypatch.setattr(JobService, "_end_overdue", raising(times, JobService._end_overdue))


def break_supervisor(served: Served, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    kind = supervisor_module.PipelineSupervisor
    monkeypatch.setattr(kind, "_replace", raising(times, kind._replace))
    served.runtime.fail()


THREADS = {"recorder": break_recorder, "timer": break_timer, "pipeline supervisor": break_supervisor}


@pytest.mark.parametrize("name", THREADS)
def test_a_thread_that_fails_once_is_shown_and_goes_on(
    served: Served, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert served.is_serving
    monkeypatch.setattr(watched_thread_module, "SHOWN_S", 60.0)
    with Client(served.head.address) as client:
        THREADS[name](served, monkeypatch, 1)
        eventually(lambda: not served.is_serving)
        assert client.status().problem == (f"the {name} thread failed and was started again: KeyError: 'injected'")
        monkeypatch.setattr(watched_thread_module, "SHOWN_S", 0.0)
        eventually(lambda: served.is_serving)
        assert client.status().problem == ""
    assert "Traceback" in caplog.text
    assert served.head.failure == ""
    job = served.service.submit(SPEC)
    assert served.service.wait(job.id, 20).state is JobState.SUCCEEDED
    eventually(lambda: not served.service._live)


@pytest.mark.parametrize("name", THREADS)
def test_a_thread_that_always_fails_ends_the_head(served: Served, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    THREADS[name](served, monkeypatch, 1_000_000)
    eventually(lambda: bool(served.head.failure))
    assert served.head.failure == f"the {name} thread has ended: KeyError: 'injected'"
    assert not served.is_serving
    assert served.service.status()["problem"] == served.head.failure


def test_the_metrics_thread(served: Served) -> None:
    metrics = served.head._metrics
    assert metrics._server is not None
    metrics._server.shutdown()
    eventually(lambda: served.head.failure == "the metrics thread has ended")
    assert not served.is_serving


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_grpc_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc._server, "_process_event_and_continue", raising(1, lambda *_: True))
    with pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(served._channel).Check(health_pb2.HealthCheckRequest(), timeout=0.5)
    eventually(lambda: served.head.failure == "the gRPC thread has ended")


@pytest.mark.parametrize("error", [KeyError("injected"), SystemExit(1)])
def test_the_engine_is_replaced(served: Served, error: BaseException) -> None:
    served.runtime.shard.hold()
    job = served.service.submit(SPEC)

    def fail() -> None:
        raise error

    served.runtime.engine._inbox.put(fail)
    assert served.service.wait(job.id, 20).state is JobState.SUCCEEDED
    assert served.runtime.starts == 2
    assert served.head.failure == ""


def test_a_store_that_cannot_be_used_is_said_and_nothing_is_taken_or_written(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem: list[str] = []

    def check() -> str:
        if problem:
            raise JobStoreError(problem[0])
        return ""

    served.runtime.shard.hold()
    job = served.service.submit(SPEC)
    monkeypatch.setattr(served.head.store, "check", check, raising=False)
    problem.append("jobs.sqlite: was removed: stop the head")
    eventually(lambda: not served.is_serving)
    assert served.service.status()["problem"] == problem[0]
    with pytest.raises(JobStoreError, match="was removed"):
        served.service.submit(SPEC)
    served.runtime.shard.let(1000)
    assert served.service.wait(job.id, 0.3).state is not JobState.SUCCEEDED
    problem.clear()
    eventually(lambda: served.is_serving)
    assert served.service.wait(job.id, 20).state is JobState.SUCCEEDED


def test_a_pipeline_that_was_given_up_is_not_serving(served: Served) -> None:
    def fail() -> None:
        raise RuntimeError("no room")

    served.runtime.before_start = fail
    served.runtime.fail()
    eventually(lambda: not served.is_serving)
    assert "starting again failed: no room" in served.service.status()["problem"]
    assert served.head.failure == "", "results can still be had"


def test_a_drain_stays_a_drain(served: Served) -> None:
    served.head.drain()
    served.head._show("")
    assert not served.is_serving
