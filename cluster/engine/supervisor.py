"""The life of a pipeline: started, watched, repaired or replaced when it fails, given up when it cannot be started."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Literal, Protocol

from cluster.common.text_format import one_line
from cluster.common.watched_thread import WatchedThread
from cluster.engine.pipeline import Pipeline

# before each attempt to start again; after as many failed ones in a row, give up
PAUSES_S = (0.0, 1.0, 5.0, 20.0, 60.0)
SOUND_AFTER_S = 60.0  # a pipeline that has run this long, or has worked, starts the pauses anew when it fails
_STOP_TIMEOUT_S = 60.0  # for a start under way when the supervision ends
_log = logging.getLogger(__name__)


class PipelineState(Enum):
    """State of a pipeline; clients are shown `restarting` and `down`."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    DOWN = "down"


PipelineEvent = Literal["start", "started", "start failed", "failed", "given up", "closed"]
TRANSITIONS: dict[tuple[PipelineState, PipelineEvent], PipelineState] = {
    (PipelineState.STOPPED, "start"): PipelineState.STARTING,
    (PipelineState.STARTING, "started"): PipelineState.RUNNING,
    (PipelineState.STARTING, "start failed"): PipelineState.STOPPED,
    (PipelineState.RUNNING, "failed"): PipelineState.RESTARTING,
    (PipelineState.RESTARTING, "started"): PipelineState.RUNNING,
    (PipelineState.RESTARTING, "start failed"): PipelineState.RESTARTING,
    (PipelineState.RESTARTING, "given up"): PipelineState.DOWN,
    **{(state, "closed"): PipelineState.STOPPED for state in PipelineState if state is not PipelineState.STARTING},
}


class PipelineListener(Protocol):
    """Callbacks of a supervised pipeline, invoked serially on the supervisor's thread."""

    def pipeline_failed(self) -> None:
        """Make durable what the failed engine has emitted: its replacement starts after this."""

    def pipeline_restarted(self) -> None:
        """Submit again what is unfinished."""

    def pipeline_given_up(self, reason: str) -> None:
        """End what is unfinished: no pipeline will run again."""


class PipelineSupervisor:
    """Owns the pipeline of a runtime: starts it, watches it, replaces it when it fails, closes it.

    Failure contract: work fails as a whole. When a shard is lost, a step fails or the hang detector gives it up,
    its engine ends every unfinished request with the error, emits no token afterwards, and wakes the supervisor.
    Requests live in memory and are lost; who submitted them submits them again.

    Without a listener that is all: submissions raise EngineError until the runtime is started anew. With one
    (`supervise`), a thread calls `pipeline_failed`, in which the listener makes tokens durable; repairs the pipeline,
    once, unless it is a repaired one that has not worked; if that does not help, stops what is left and starts another
    pipeline, after pauses that grow while they fail without having worked; and calls `pipeline_restarted`. After
    `len(PAUSES_S)` failed starts in a row it calls `pipeline_given_up`, and only a new head process helps.

    Failures are read from the engine of the current pipeline, not from a message: one that is reported twice, or by a
    pipeline that has been replaced meanwhile, changes nothing.
    """

    repairs = True  # False: every failure is followed by a full restart, for comparison

    def __init__(self, launch: Callable[[], Pipeline], clock: Callable[[], float] = time.monotonic) -> None:
        """Args: `launch` starts a pipeline and returns it running, or raises with nothing left running."""
        self._launch = launch
        self._clock = clock
        self._changed = threading.Condition()
        self.num_repaired = self.num_restarted = 0  # pipelines that failed and were followed by another, by how
        self.last_recovery_s = 0.0  # from the newest failure until there was a pipeline again
        self._is_repaired = False  # the newest one
        self._attempts = 0  # to start again since a pipeline was last sound
        self._started_at = 0.0
        self._stopping = threading.Event()  # of the newest `supervise`
        self._thread: WatchedThread | None = None
        self.state = PipelineState.STOPPED
        self.newest: Pipeline | None = None  # the pipeline that was started last, running or not
        self.reason = ""  # why it was given up

    @property
    def thread(self) -> WatchedThread | None:
        """The supervising thread, None while nobody supervises."""
        return self._thread

    @property
    def running(self) -> Pipeline | None:
        """The pipeline that takes requests, None while there is none; it may have failed a moment ago."""
        return self.newest if self.state is PipelineState.RUNNING else None

    def start(self) -> None:
        """Start the pipeline; raises what `launch` raises."""
        self._transition("start")
        self.reason = ""
        try:
            pipeline = self._launch()
        except BaseException:
            self._transition("start failed")
            raise
        self._adopt(pipeline, threading.Event())

    def close(self) -> None:
        """End the supervision and stop the pipeline; may be called twice."""
        self.release()
        self._transition("closed")
        if self.newest is not None:
            self.newest.close()

    def supervise(self, listener: PipelineListener) -> None:
        """Replace the pipeline whenever it fails, or has failed already, until `release`."""
        if self._thread is not None:
            raise RuntimeError("the pipeline is supervised already")
        self._stopping = threading.Event()
        run = partial(self._run, listener, self._stopping)  # goes on in whatever state it failed
        self._thread = WatchedThread(run, "pipeline supervisor", self._stopping)
        self._thread.start()

    def release(self) -> None:
        """End the supervision: wait, up to a minute, for what it does; then the listener is not called any more."""
        self._stopping.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            self._thread = None

    # --- internals ---------------------------------------------------------------------------------------------------

    def _transition(self, event: PipelineEvent) -> None:
        with self._changed:
            if (self.state, event) not in TRANSITIONS:
                raise RuntimeError(f"the pipeline is {self.state.value}: {event!r} cannot happen to it")
            self.state = TRANSITIONS[self.state, event]

    def _adopt(self, pipeline: Pipeline, stopping: threading.Event) -> bool:
        """Make a started pipeline the current one; returns False, with no change, if the supervision has ended."""
        pipeline.engine.on_failure = self._wake
        with self._changed:
            if stopping.is_set():
                return False
            self.newest, self._started_at = pipeline, self._clock()
            self._transition("started")
            return True

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self, listener: PipelineListener, stopping: threading.Event) -> None:
        while error := self._wait_for_failure(stopping):
            _log.error("the pipeline failed: %s", error)
            _call(listener.pipeline_failed)
            self._replace(error, listener, stopping)

    def _wait_for_failure(self, stopping: threading.Event) -> str:
        """Return the error of the current pipeline once it has failed, or "" when the supervision ends."""
        with self._changed:
            self._changed.wait_for(lambda: stopping.is_set() or self._error())
            if stopping.is_set():
                return ""
            if self.state is PipelineState.RUNNING:  # else an earlier supervision ended during the restart
                self._transition("failed")
            return self._error()

    def _error(self) -> str:
        may_fail = self.state in (PipelineState.RUNNING, PipelineState.RESTARTING)
        return self.newest.engine.error if may_fail and self.newest is not None else ""

    def _replace(self, error: str, listener: PipelineListener, stopping: threading.Event) -> None:
        """Have another pipeline in place of one that failed with `error`, or give up."""
        began = self._clock()
        has_worked = self.newest is not None and self.newest.engine.has_worked
        if has_worked or began - self._started_at >= SOUND_AFTER_S:
            self._attempts = 0
        may_repair = self.repairs and (has_worked or not self._is_repaired)
        if may_repair and (pipeline := self._repair()) is not None:
            if self._adopt(pipeline, stopping):
                self._is_repaired = True
                self.num_repaired += 1
                self._recovered(began, listener)
            else:
                pipeline.close()
            return
        failed_starts = 0
        while not stopping.wait(self._pause_s()):
            self._attempts += 1
            try:
                if self.newest is not None:
                    self.newest.close()
                pipeline = self._launch()
            except BaseException as problem:  # noqa: BLE001 - whatever it was, the jobs must end with it in the end
                if stopping.is_set():
                    return
                failed_starts += 1
                _log.exception("attempt %d to start the pipeline again failed", failed_starts)
                if failed_starts < len(PAUSES_S):
                    self._transition("start failed")
                    continue
                self.reason = f"{error}; starting again failed: {one_line(problem)}"
                self._transition("given up")
                _call(listener.pipeline_given_up, self.reason)
            else:
                if self._adopt(pipeline, stopping):
                    self._is_repaired = False
                    self.num_restarted += 1
                    self._recovered(began, listener)
                else:
                    pipeline.close()
            return

    def _repair(self) -> Pipeline | None:
        """Return the pipeline that the newest one could be repaired to; None if it must be started anew."""
        if self.newest is None or self.newest.repair is None:
            return None
        try:
            return self.newest.repair()
        except BaseException as problem:  # noqa: BLE001 - whatever it was, a full restart may help
            _log.error("the pipeline is not repaired but started anew: %s", one_line(problem), exc_info=True)
            return None

    def _recovered(self, began: float, listener: PipelineListener) -> None:
        self.last_recovery_s = self._clock() - began
        _call(listener.pipeline_restarted)

    def _pause_s(self) -> float:
        return PAUSES_S[min(self._attempts, len(PAUSES_S) - 1)]


def _call(callback: Callable[..., None], *arguments: str) -> None:
    try:
        callback(*arguments)
    except BaseException:  # noqa: BLE001 - the pipeline must be replaced whatever the listener does
        _log.exception("a listener of the pipeline failed")
