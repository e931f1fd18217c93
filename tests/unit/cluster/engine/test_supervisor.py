"""The life of a pipeline: every transition, the pauses, giving up, closing at any moment, reports that mean nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from cluster.engine import supervisor as supervisor_module
from cluster.engine.supervisor import PAUSES_S, TRANSITIONS, PipelineEvent, PipelineState, PipelineSupervisor
from tests.support.fakes.stage import WAIT, eventually

S = PipelineState
LEGAL: set[tuple[PipelineState, PipelineEvent, PipelineState]] = {
    (S.STOPPED, "start", S.STARTING),
    (S.STOPPED, "closed", S.STOPPED),
    (S.STARTING, "started", S.RUNNING),
    (S.STARTING, "start failed", S.STOPPED),
    (S.RUNNING, "failed", S.RESTARTING),
    (S.RUNNING, "closed", S.STOPPED),
    (S.RESTARTING, "started", S.RUNNING),
    (S.RESTARTING, "start failed", S.RESTARTING),
    (S.RESTARTING, "given up", S.DOWN),
    (S.RESTARTING, "closed", S.STOPPED),
    (S.DOWN, "closed", S.STOPPED),
}


class FakePipeline:
    """A pipeline that only fails and ends."""

    def __init__(self, number: int, log: list[str]) -> None:
        self.engine = SimpleNamespace(error="", on_failure=None, has_worked=False)
        self.number = number
        self.repair: Callable[[], FakePipeline] | None = None
        self._log = log

    def fail(self, error: str = "lost") -> None:
        self.engine.error = error
        if self.engine.on_failure is not None:
            self.engine.on_failure()

    def close(self) -> None:
        self._log.append(f"close {self.number}")


class Scene:
    """A supervisor over fake pipelines, and the listener of it. `launching` is called at each start."""

    def __init__(self) -> None:
        self.pause_s = 0.0  # instead of the real one
        self.asked: list[float] = []  # the real ones
        self.log: list[str] = []
        self.now = 0.0
        self.pipelines: list[FakePipeline] = []
        self.launching: Callable[[int], None] = lambda number: None
        self.on_failed: Callable[[], None] = lambda: None
        self.on_restarted: Callable[[], None] = lambda: None
        launch: Any = self._launch
        self.supervisor = PipelineSupervisor(launch, clock=lambda: self.now)
        self._real_pause_s = self.supervisor._pause_s
        self.supervisor._pause_s = self._pause_s  # type: ignore[method-assign]

    def _pause_s(self) -> float:
        self.asked.append(self._real_pause_s())
        return self.pause_s

    def _launch(self) -> FakePipeline:
        number = len([line for line in self.log if line.startswith("launch")]) + 1
        self.log.append(f"launch {number}")
        self.launching(number)
        self.pipelines.append(FakePipeline(number, self.log))
        return self.pipelines[-1]

    def pipeline_failed(self) -> None:
        self.log.append("failed")
        self.on_failed()

    def pipeline_restarted(self) -> None:
        self.log.append("restarted")
        self.on_restarted()

    def pipeline_given_up(self, reason: str) -> None:
        self.log.append(f"given up: {reason}")

    def supervised(self) -> Scene:
        self.supervisor.start()
        self.supervisor.supervise(self)
        return self

    def reaches(self, entry: str, times: int = 1) -> None:
        eventually(lambda: self.log.count(entry) >= times)

    def settle(self) -> None:
        """Wait until whatever the supervisor might do has been done."""
        time.sleep(0.05)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.supervisor.close()


@pytest.mark.parametrize("event", get_args(PipelineEvent))
@pytest.mark.parametrize("state", S)
def test_every_transition(scene: Scene, state: PipelineState, event: PipelineEvent) -> None:
    scene.supervisor.state = state
    expected = [after for before, what, after in LEGAL if (before, what) == (state, event)]
    if expected:
        scene.supervisor._transition(event)
        assert scene.supervisor.state is expected[0]
    else:
        with pytest.raises(RuntimeError, match=f"the pipeline is {state.value}: '{event}' cannot happen to it"):
            scene.supervisor._transition(event)
        assert scene.supervisor.state is state
    scene.supervisor.state = S.STOPPED


def test_the_table_has_nothing_else() -> None:
    assert {(before, event, after) for (before, event), after in TRANSITIONS.items()} == LEGAL


def test_start_and_close_twice(scene: Scene) -> None:
    supervisor = scene.supervisor
    supervisor.close()
    assert (supervisor.state, supervisor.running, supervisor.newest) == (S.STOPPED, None, None)
    supervisor.start()
    first: Any = scene.pipelines[0]
    assert (supervisor.state, supervisor.running, supervisor.newest) == (S.RUNNING, first, first)
    with pytest.raises(RuntimeError, match="the pipeline is running"):
        supervisor.start()
    supervisor.close()
    supervisor.close()
    assert (supervisor.state, supervisor.running, supervisor.newest) == (S.STOPPED, None, first)
    supervisor.start()
    assert supervisor.running is not first


def test_a_first_start_that_fails(scene: Scene) -> None:
    def refuse(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    scene.launching = refuse
    with pytest.raises(KeyboardInterrupt):
        scene.supervisor.start()
    assert scene.supervisor.state is S.STOPPED
    scene.supervisor.start()
    assert scene.supervisor.state is S.RUNNING


def test_without_a_listener_a_failed_pipeline_stays(scene: Scene) -> None:
    scene.supervisor.start()
    scene.pipelines[0].fail()
    scene.settle()
    assert scene.log == ["launch 1"]
    assert scene.supervisor.state is S.RUNNING


def test_a_failed_pipeline_is_replaced(scene: Scene) -> None:
    scene.supervised()
    states: list[PipelineState] = []
    scene.launching = lambda number: states.append(scene.supervisor.state)
    scene.on_failed = lambda: states.append(scene.supervisor.state)
    scene.on_restarted = lambda: states.append(scene.supervisor.state)
    scene.pipelines[0].fail()
    scene.reaches("restarted")
    assert scene.log == ["launch 1", "failed", "close 1", "launch 2", "restarted"]
    assert states == [S.RESTARTING, S.RESTARTING, S.RUNNING]
    running: Any = scene.supervisor.running
    assert running is scene.pipelines[1]


def test_a_failure_before_the_supervision_counts(scene: Scene) -> None:
    scene.supervisor.start()
    scene.pipelines[0].fail()
    scene.supervisor.supervise(scene)
    scene.reaches("restarted")
    assert scene.log == ["launch 1", "failed", "close 1", "launch 2", "restarted"]


def test_supervised_once_at_a_time(scene: Scene) -> None:
    scene.supervised()
    with pytest.raises(RuntimeError, match="supervised already"):
        scene.supervisor.supervise(scene)
    scene.supervisor.release()
    scene.supervisor.release()
    scene.pipelines[0].fail()
    scene.settle()
    assert scene.log == ["launch 1"]
    scene.supervisor.supervise(scene)
    scene.reaches("restarted")


def test_a_failure_reported_again_changes_nothing(scene: Scene) -> None:
    scene.supervised()
    scene.on_failed = scene.pipelines[0].fail
    scene.launching = lambda number: scene.pipelines[0].fail()
    scene.on_restarted = scene.pipelines[0].fail  # by a pipeline that has been replaced
    scene.pipelines[0].fail()
    scene.pipelines[0].fail()
    scene.reaches("restarted")
    scene.pipelines[0].fail()
    scene.settle()
    assert scene.log == ["launch 1", "failed", "close 1", "launch 2", "restarted"]
    assert scene.supervisor.state is S.RUNNING


def test_a_pipeline_that_fails_before_anybody_used_it(scene: Scene) -> None:
    """Its predecessor's replacement is finished first: callbacks never overlap."""
    scene.supervised()
    scene.on_restarted = lambda: scene.pipelines[1].fail() if len(scene.pipelines) == 2 else None
    scene.pipelines[0].fail()
    scene.reaches("restarted", 2)
    first = ["launch 1", "failed", "close 1", "launch 2", "restarted"]
    assert scene.log == [*first, "failed", "close 2", "launch 3", "restarted"]


def test_a_pipeline_that_breaks_soon_waits_longer_but_is_not_given_up(scene: Scene) -> None:
    scene.supervised()
    for restarts in range(1, 8):
        scene.now += 59.0
        scene.pipelines[-1].fail()
        scene.reaches("restarted", restarts)
    assert scene.asked == [0.0, 1.0, 5.0, 20.0, 60.0, 60.0, 60.0]
    scene.now += 60.0  # this one was sound
    scene.pipelines[-1].fail()
    scene.reaches("restarted", 8)
    assert scene.asked[7:] == [0.0]
    for restarts in (9, 10):
        scene.pipelines[-1].engine.has_worked = True
        scene.pipelines[-1].fail()
        scene.reaches("restarted", restarts)
    assert scene.asked[8:] == [0.0, 0.0]


def test_given_up_after_five_failed_starts_in_a_row(scene: Scene) -> None:
    assert PAUSES_S == (0.0, 1.0, 5.0, 20.0, 60.0)

    def refuse(number: int) -> None:
        if number not in (1, 6):  # four failures are forgiven
            raise RuntimeError("no room\nat all")

    scene.launching = refuse
    scene.supervised()
    scene.pipelines[0].fail("stage 0 is gone")
    scene.reaches("restarted")
    assert scene.asked == [0.0, 1.0, 5.0, 20.0, 60.0]
    scene.now += 60.0
    scene.pipelines[-1].fail("stage 1 is gone")
    eventually(lambda: scene.supervisor.state is S.DOWN)
    reason = "stage 1 is gone; starting again failed: no room at all"
    scene.reaches(f"given up: {reason}")
    assert scene.supervisor.reason == reason
    assert scene.supervisor.running is None
    assert scene.asked[5:] == [0.0, 1.0, 5.0, 20.0, 60.0]
    assert scene.log.count("restarted") == 1
    scene.pipelines[-1].fail()
    scene.settle()
    assert scene.log[-1] == f"given up: {reason}"
    scene.supervisor.close()
    scene.launching = lambda number: None
    scene.supervisor.start()
    assert (scene.supervisor.state, scene.supervisor.reason) == (S.RUNNING, "")


@pytest.mark.parametrize("callback", ["on_failed", "on_restarted"])
def test_a_listener_that_raises_stops_nothing(scene: Scene, callback: str, caplog: pytest.LogCaptureFixture) -> None:
    def bad() -> None:
        raise KeyError("the disk is full")

    scene.supervised()
    setattr(scene, callback, bad)
    for restarts in (1, 2):
        scene.pipelines[-1].fail()
        scene.reaches("restarted", restarts)
    assert "the disk is full" in caplog.text


def test_close_during_a_pause(scene: Scene) -> None:
    scene.supervised()
    scene.pause_s = 3600.0
    scene.pipelines[0].fail()
    scene.reaches("failed")
    scene.supervisor.close()
    assert scene.log == ["launch 1", "failed", "close 1"]
    assert scene.supervisor.state is S.STOPPED


def test_close_while_the_listener_takes_note(scene: Scene) -> None:
    scene.supervised()
    closing = threading.Thread(target=scene.supervisor.close)

    def slow() -> None:
        closing.start()
        eventually(scene.supervisor._stopping.is_set)

    scene.on_failed = slow
    scene.pipelines[0].fail()
    scene.reaches("close 1")
    closing.join(WAIT)
    assert scene.log == ["launch 1", "failed", "close 1"]


@pytest.mark.parametrize("patience_s", [WAIT, 0.0])
def test_close_during_a_restart(scene: Scene, patience_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that comes up too late is closed at once, whether the close still waits for it or not."""
    monkeypatch.setattr(supervisor_module, "_STOP_TIMEOUT_S", patience_s)
    scene.supervised()
    under_way, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        under_way.set()
        go.wait(WAIT)

    scene.launching = slow
    scene.pipelines[0].fail()
    assert under_way.wait(WAIT)
    closing = threading.Thread(target=scene.supervisor.close)
    closing.start()
    if not patience_s:
        closing.join(WAIT)
        assert scene.supervisor.state is S.STOPPED
    eventually(scene.supervisor._stopping.is_set)
    go.set()
    closing.join(WAIT)
    scene.reaches("close 2")
    assert "restarted" not in scene.log
    assert scene.supervisor.state is S.STOPPED
    newest: Any = scene.supervisor.newest
    assert newest is scene.pipelines[0]


def test_a_supervision_that_ended_during_a_restart_goes_on_with_the_next(scene: Scene) -> None:
    scene.supervised()
    scene.pause_s = 3600.0
    scene.pipelines[0].fail()
    scene.reaches("failed")
    scene.supervisor.release()
    assert scene.supervisor.state is S.RESTARTING
    scene.pause_s = 0.0
    scene.supervisor.supervise(scene)
    scene.reaches("restarted")
    assert scene.supervisor.state is S.RUNNING
