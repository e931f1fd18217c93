"""Late and still is hung; late and moving is slow. The clock and the shards are the test's."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.common.errors import StageError
from cluster.engine.hang_detector import HangDetector
from protos.stage import stage_pb2 as pb
from protos.stage.messages import StepPlan


class Shard:
    def __init__(self, stage: int) -> None:
        self.name = f"stage {stage} shard 0"
        self.shard = SimpleNamespace(stage=stage)
        self.layers = 7
        self.computes = False
        self.answers = True

    def probe(self, timeout_s: float = 5.0) -> pb.ProbeReply:
        if not self.answers:
            raise StageError("no answer")
        return pb.ProbeReply(layers_done=self.layers, is_computing=self.computes)


class Scene:
    """A step in flight, a clock that a test moves, two shards."""

    def __init__(self, predicted: float = 1.0) -> None:
        self.now = 0.0
        self.shards = [Shard(0), Shard(1)]
        latency = SimpleNamespace(predict=lambda plan: predicted)
        self.engine: Any = SimpleNamespace(oldest_plan=StepPlan(1, ()), latency=latency)
        self.detector = HangDetector(self.engine, self.shards, clock=lambda: self.now)

    def pass_time(self, seconds: float, every: float = 4.0, moving: int | None = None) -> str:
        end = self.now + seconds
        while self.now < end:
            self.now += every
            if moving is not None:
                self.shards[moving].layers += 1
            if reason := self.detector.check():
                return reason
        return ""


def test_a_step_without_progress_is_hung_after_twenty_seconds():
    scene = Scene()
    assert scene.pass_time(23) == ""
    assert "hung: no shard has finished a layer: step 1" in scene.pass_time(6)
    assert 20 < scene.now <= 32


@pytest.mark.parametrize("moving", [0, 1])
def test_a_slow_step_is_not_hung(moving: int):
    scene = Scene()
    assert scene.pass_time(3600, moving=moving) == ""
    assert "hung" in scene.pass_time(30)


def test_a_layer_every_nineteen_seconds_is_slow():
    scene = Scene()
    assert all(scene.pass_time(19, every=9.5) == "" and not _bump(scene) for _ in range(20))


def _bump(scene: Scene) -> None:
    scene.shards[0].layers += 1


def test_a_long_prediction_is_waited_for():
    scene = Scene(predicted=60.0)
    assert scene.pass_time(300) == ""
    assert "60.0 s were predicted" in scene.pass_time(10)


def test_a_shard_that_does_not_answer_is_named_and_does_not_count_as_moving():
    scene = Scene()
    scene.pass_time(10)
    scene.shards[1].answers = False
    reason = scene.pass_time(60)
    assert reason.startswith("hung: stage 1 shard 0 does not answer")
    assert scene.now <= 42
    assert scene.detector.hung_stages == {1}


@pytest.mark.parametrize("busy", [(), (0,), (1,), (0, 1)])
def test_where_all_answer_those_that_compute_are_hung(busy: tuple[int, ...]):
    scene = Scene()
    for stage in busy:
        scene.shards[stage].computes = True
    assert "no shard has finished a layer" in scene.pass_time(30)
    assert scene.detector.hung_stages == set(busy)
    scene.shards[0].answers = False
    scene.engine.oldest_plan = StepPlan(2, ())
    assert scene.pass_time(60)
    assert scene.detector.hung_stages == {0}, "who answers may wait for it inside a step"


def test_a_stop_within_what_was_predicted_is_waited_for():
    """Sixty seconds in which a stage neither answers nor moves, where a step is to take fifteen."""
    scene = Scene(predicted=15.0)
    assert scene.pass_time(8, moving=1) == ""
    scene.shards[0].answers = False
    assert scene.pass_time(60) == ""
    scene.shards[0].answers = True
    assert scene.pass_time(600, moving=0) == ""
    scene.shards[0].answers = False
    assert scene.pass_time(30)


def test_steps_that_follow_each_other_start_the_watch_anew():
    scene = Scene()
    for step in range(2, 9):
        assert scene.pass_time(18) == ""
        scene.engine.oldest_plan = StepPlan(step, ())
    scene.engine.oldest_plan = None
    assert scene.pass_time(600) == ""


class Panic(BaseException):
    """Such as extensions in Rust raise."""


@pytest.mark.parametrize(("times", "fails"), [(4, False), (5, True)])
def test_checks_that_fail_are_logged_and_in_the_end_fail_the_pipeline(
    times: int, fails: bool, caplog: pytest.LogCaptureFixture
):
    failed: list[str] = []
    done = threading.Event()
    left = [times]

    def check() -> str:
        if left[0]:
            left[0] -= 1
            raise Panic("no threads")
        done.set()
        return ""

    def fail(reason: str, stages: frozenset[int]) -> None:
        failed.append(reason)
        done.set()

    engine: Any = SimpleNamespace(oldest_plan=None, fail=fail)
    detector = HangDetector(engine, [], floor_s=0.05)
    detector.check = check  # type: ignore[method-assign]
    detector.start()
    assert done.wait(20)
    detector.close()
    assert failed == (["the hang detector failed: Panic: no threads"] if fails else [])
    assert "Traceback" in caplog.text


def test_what_is_due_after_a_check_is_done():
    done = threading.Event()
    engine: Any = SimpleNamespace(oldest_plan=None)
    detector = HangDetector(engine, [], done.set, floor_s=0.05)
    detector.start()
    assert done.wait(60)
    detector.close()
