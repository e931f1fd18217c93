"""The life of a pipeline: started, watched, replaced when it fails, given up when it cannot be started again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cluster.common.text_format import one_line
from cluster.engine.pipeline import Pipeline

_STOP_TIMEOUT_S = 60.0  # to wait for a start under way when supervision ends
_log = logging.getLogger(__name__)


class PipelineState(Enum):
    """State of a pipeline; `restarting` and `down` are shown to clients."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    DOWN = "down"


class PipelineEvent(Enum):
    """What happens to a pipeline."""

    START = "start"
    STARTED = "started"
    START_FAILED = "start failed"
    FAILED = "failed"
    GIVEN_UP = "given up"
    CLOSED = "closed"


TRANSITIONS = {
    (PipelineState.STOPPED, PipelineEvent.START): PipelineState.STARTING,
    (PipelineState.STARTING, PipelineEvent.STARTED): PipelineState.RUNNING,
    (PipelineState.STARTING, PipelineEvent.START_FAILED): PipelineState.STOPPED,
    (PipelineState.RUNNING, PipelineEvent.FAILED): PipelineState.RESTARTING,
    (PipelineState.RESTARTING, PipelineEvent.STARTED): PipelineState.RUNNING,
    (PipelineState.RESTARTING, PipelineEvent.START_FAILED): PipelineState.RESTARTING,
    (PipelineState.RESTARTING, PipelineEvent.GIVEN_UP): PipelineState.DOWN,
    (PipelineState.RUNNING, PipelineEvent.CLOSED): PipelineState.STOPPED,
    (PipelineState.RESTARTING, PipelineEvent.CLOSED): PipelineState.STOPPED,
    (PipelineState.DOWN, PipelineEvent.CLOSED): PipelineState.STOPPED,
    (PipelineState.STOPPED, PipelineEvent.CLOSED): PipelineState.STOPPED,
}


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds to wait before each attempt to start again since the pipeline was last sound.

    A pipeline is sound once it has run for `sound_after_s`. After as many failed starts in a row as there are pauses
    it is given up.
    """

    pauses_s: tuple[float, ...] = (0.0, 1.0, 5.0, 20.0, 60.0)
    sound_after_s: float = 60.0

    def pause_s(self, attempts: int) -> float:
        """Return the pause after `attempts` attempts; the last one repeats."""
        return self.pauses_s[min(attempts, len(self.pauses_s) - 1)]


class PipelineListener(Protocol):
    """Callbacks of a supervised pipeline, invoked one after the other on the supervisor's thread."""

    def pipeline_failed(self) -> None:
        """Take note before the replacement starts; the failed engine emits no token any more."""

    def pipeline_restarted(self) -> None:
        """Submit again what is unfinished: a new pipeline runs."""

    def pipeline_given_up(self, reason: str) -> None:
        """End what is unfinished: no pipeline will run again."""


class PipelineSupervisor:
    """Owns the one pipeline of a runtime from its first start to its end.

    Failure contract: a pipeline fails as a whole. When a shard is lost, a step fails, or the hang detector gives it up,
    its engine ends every unfinished request with the error, emits no further token, and wakes the supervisor. Requests
    live in memory and are lost; whoever submitted them submits them again. Without a listener nothing is restarted:
    submissions raise EngineError until the owner of the runtime closes it or starts it again.

    With a listener (`supervise`), one thread replaces a failed pipeline: it calls `pipeline_failed`, in which the
    listener makes durable what the engine had emitted; then stops what is left and starts anew, with the pauses of
    `RestartPolicy`; then calls `pipeline_restarted`. After too many failed starts in a row it calls
    `pipeline_given_up`, and only a new process starts over. A pipeline that starts but fails again soon is never given
    up, each restart waits longer.

    Failures are read from the engine of the current pipeline (`Engine.error`), never from a message: one that is
    reported twice, or by a pipeline that has been replaced meanwhile, changes nothing.
    """

    def __init__(
        self, launch: Callable[[], Pipeline], policy: RestartPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Args: `launch` starts a pipeline and returns it running, or raises with nothing left running."""
        self._launch = launch
        self.policy = policy or RestartPolicy()
        self._clock = clock
        self._changed = threading.Condition()
        self._state = PipelineState.STOPPED
        self._pipeline: Pipeline | None = None  # the newest; kept after its end for what it says about itself
        self._attempts = 0  # to start again since the pipeline was last sound
        self._started_at = 0.0
        self._stopping = threading.Event()  # replaced by each `supervise`
        self._thread: threading.Thread | None = None
        self.reason = ""  # why the pipeline was given up

    @property
    def state(self) -> PipelineState:
        return self._state

    @property
    def newest(self) -> Pipeline | None:
        """The pipeline that was started last, running or not."""
        return self._pipeline

    @property
    def running(self) -> Pipeline | None:
        """The pipeline that takes requests; None while there is none. Its engine may have failed a moment ago."""
        return self._pipeline if self._state is PipelineState.RUNNING else None

    def start(self) -> None:
        """Start the pipeline; raises what `launch` raises."""
        self._transition(PipelineEvent.START)
        self.reason = ""
        try:
            pipeline = self._launch()
        except BaseException:
            self._transition(PipelineEvent.START_FAILED)
            raise
        self._adopt(pipeline, threading.Event())

    def close(self) -> None:
        """Stop the pipeline and its supervision; may be called twice."""
        self.release()
        self._transition(PipelineEvent.CLOSED)
        if self._pipeline is not None:
            self._pipeline.close()

    def supervise(self, listener: PipelineListener) -> None:
        """Replace the pipeline whenever it fails, from now on and if it has failed already, until `release`."""
        if self._thread is not None:
            raise RuntimeError("the pipeline is supervised already")
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listener, self._stopping), name="pipeline supervisor", daemon=True
        )
        self._thread.start()

    def release(self) -> None:
        """End the supervision: the listener is not called any more; waits for a start under way, up to a minute."""
        self._stopping.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            self._thread = None

    # --- internals ---------------------------------------------------------------------------------------------------

    def _transition(self, event: PipelineEvent) -> None:
        with self._changed:
            following = TRANSITIONS.get((self._state, event))
            if following is None:
                raise RuntimeError(f"the pipeline is {self._state.value}: {event.value!r} cannot happen to it")
            self._state = following

    def _adopt(self, pipeline: Pipeline, stopping: threading.Event) -> bool:
        """Make a running pipeline the current one; False, and nothing changed, when the supervision has ended."""
        pipeline.engine.on_failure = self._wake
        with self._changed:
            if stopping.is_set():
                return False
            self._pipeline, self._started_at = pipeline, self._clock()
            self._transition(PipelineEvent.STARTED)
            return True

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self, listener: PipelineListener, stopping: threading.Event) -> None:
        while error := self._wait_for_failure(stopping):
            _log.error("the pipeline failed: %s", error)
            _guarded(listener.pipeline_failed)
            self._replace(error, listener, stopping)

    def _wait_for_failure(self, stopping: threading.Event) -> str:
        """Return the error of the current pipeline once it has failed, or "" when the supervision ends."""
        with self._changed:
            self._changed.wait_for(lambda: stopping.is_set() or self._error())
            error = "" if stopping.is_set() else self._error()
            if error and self._state is PipelineState.RUNNING:
                self._transition(PipelineEvent.FAILED)
            return error

    def _error(self) -> str:
        alive = self._state in (PipelineState.RUNNING, PipelineState.RESTARTING)
        return self._pipeline.engine.error if alive and self._pipeline is not None else ""

    def _replace(self, error: str, listener: PipelineListener, stopping: threading.Event) -> None:
        """Start a new pipeline in place of one that failed with `error`, or give up."""
        if self._clock() - self._started_at >= self.policy.sound_after_s:
            self._attempts = 0
        failed_starts = 0
        while not stopping.wait(self.policy.pause_s(self._attempts)):
            self._attempts += 1
            try:
                pipeline = self._relaunch()
            except Exception as problem:  # noqa: BLE001 - whatever it was, the jobs must end with it in the end
                failed_starts += 1
                _log.exception("attempt %d to start the pipeline again failed", failed_starts)
                if failed_starts < len(self.policy.pauses_s):
                    self._transition(PipelineEvent.START_FAILED)
                    continue
                self.reason = f"{error}; starting again failed: {one_line(problem)}"
                self._transition(PipelineEvent.GIVEN_UP)
                _guarded(lambda: listener.pipeline_given_up(self.reason))
            else:
                if self._adopt(pipeline, stopping):
                    _guarded(listener.pipeline_restarted)
                else:
                    pipeline.close()
            return

    def _relaunch(self) -> Pipeline:
        if self._pipeline is not None:
            self._pipeline.close()
        return self._launch()


def _guarded(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # noqa: BLE001 - the pipeline must be replaced whatever the listener does
        _log.exception("a listener of the pipeline failed")
