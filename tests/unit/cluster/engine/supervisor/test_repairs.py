"""A pipeline that can be repaired: once, before the full restart; failures and ends while that goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from cluster.engine import supervisor as supervisor_module
from cluster.engine.supervisor import PipelineState
from tests.support.fakes.stage import WAIT, eventually
from tests.unit.cluster.engine.test_supervisor import FakePipeline, Scene


class Repairs(Scene):
    """Every pipeline can be repaired; `repairing` is called at each repair."""

    def __init__(self) -> None:
        super().__init__()
        self.repairing: Callable[[int], None] = lambda number: None

    def _launch(self) -> FakePipeline:
        pipeline = super()._launch()
        pipeline.repair = lambda: self._repair(pipeline)
        return pipeline

    def _repair(self, failed: FakePipeline) -> FakePipeline:
        self.log.append(f"repair {failed.number}")
        self.repairing(failed.number)
        number = failed.number + 10
        self.pipelines.append(FakePipeline(number, self.log))
        repaired = self.pipelines[-1]
        repaired.repair = lambda: self._repair(repaired)
        return repaired

    def counted(self) -> tuple[int, int]:
        return self.supervisor.num_repaired, self.supervisor.num_restarted


@pytest.fixture
def scene() -> Iterator[Repairs]:
    made = Repairs()
    yield made
    made.supervisor.close()


FIRST = ["launch 1", "failed", "repair 1"]


def test_a_failed_pipeline_is_repaired(scene: Repairs) -> None:
    scene.supervised()
    states: list[PipelineState] = []

    def repairing(number: int) -> None:
        states.append(scene.supervisor.state)
        scene.now += 3.0

    scene.repairing = repairing
    scene.pipelines[0].fail()
    scene.reaches("restarted")
    assert scene.log == [*FIRST, "restarted"], "it is not closed: its processes go on"
    assert (states, scene.supervisor.state) == ([PipelineState.RESTARTING], PipelineState.RUNNING)
    assert scene.supervisor.newest is scene.pipelines[1]  # type: ignore[comparison-overlap]
    assert (scene.counted(), scene.supervisor.last_recovery_s) == ((1, 0), 3.0)


def test_a_repair_that_fails_is_followed_by_a_full_restart(scene: Repairs) -> None:
    def refuse(number: int) -> None:
        scene.now += 2.0
        raise KeyError("two of two stages\nare broken")

    scene.repairing = refuse
    scene.supervised()
    scene.pipelines[0].fail()
    scene.reaches("restarted")
    assert scene.log == [*FIRST, "close 1", "launch 2", "restarted"]
    assert scene.asked == [0.0], "at once"
    assert (scene.counted(), scene.supervisor.last_recovery_s) == ((0, 1), 2.0)


def test_a_repaired_pipeline_is_repaired_again_once_it_has_worked(scene: Repairs) -> None:
    scene.supervised()
    scene.pipelines[0].fail()
    scene.reaches("restarted")
    scene.pipelines[-1].engine.has_worked = True
    scene.pipelines[-1].fail()
    scene.reaches("restarted", 2)
    assert scene.log == [*FIRST, "restarted", "failed", "repair 11", "restarted"]
    scene.pipelines[-1].fail()  # without having worked
    scene.reaches("restarted", 3)
    assert scene.log[7:] == ["failed", "close 21", "launch 2", "restarted"]
    scene.pipelines[-1].fail()  # a start as a whole is always worth a repair
    scene.reaches("restarted", 4)
    assert scene.log[11:] == ["failed", "repair 2", "restarted"]
    assert scene.counted() == (3, 1)


def test_a_second_failure_during_the_repair(scene: Repairs) -> None:
    """The pipeline that is repaired fails again, which is no news; the new one does at once."""
    scene.repairing = lambda number: scene.pipelines[0].fail("another shard")
    scene.on_restarted = lambda: scene.pipelines[1].fail() if len(scene.pipelines) == 2 else None
    scene.supervised()
    scene.pipelines[0].fail()
    scene.reaches("restarted", 2)
    assert scene.log == [*FIRST, "restarted", "failed", "close 11", "launch 2", "restarted"]


def test_full_restarts_can_be_asked_for(scene: Repairs) -> None:
    scene.supervisor.repairs = False
    scene.supervised()
    scene.pipelines[0].fail()
    scene.reaches("restarted")
    assert scene.log == ["launch 1", "failed", "close 1", "launch 2", "restarted"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("patience_s", [WAIT, 0.0])
def test_close_during_a_repair(scene: Repairs, patience_s: float, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes up too late is closed at once, whether the close still waits for it or not."""
    monkeypatch.setattr(supervisor_module, "_STOP_TIMEOUT_S", patience_s)
    scene.supervised()
    under_way, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        under_way.set()
        go.wait(WAIT)
        if fails:
            raise KeyError("closed")

    scene.repairing = slow
    scene.pipelines[0].fail()
    assert under_way.wait(WAIT)
    supervising = scene.supervisor.thread
    closing = threading.Thread(target=scene.supervisor.close)
    closing.start()
    if not patience_s:
        closing.join(WAIT)
        assert scene.supervisor.state is PipelineState.STOPPED
    eventually(scene.supervisor._stopping.is_set)
    go.set()
    closing.join(WAIT)
    assert supervising is not None
    supervising.join(WAIT)
    assert ("close 11" in scene.log) == (not fails)
    assert "close 1" in scene.log
    assert not {"restarted", "launch 2"} & set(scene.log)
    assert scene.supervisor.state is PipelineState.STOPPED
    assert scene.supervisor.newest is scene.pipelines[0]  # type: ignore[comparison-overlap]
