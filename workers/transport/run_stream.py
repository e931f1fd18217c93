"""The shard's end of a run: where plans come from and results go, the call itself or a pipe the call names."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from protos.stage import stage_pb2 as pb
from protos.stage.pipe import STEPS_KEY, Pipe


class RunStream:
    """Plans and results of one Run call."""

    def __init__(self, bursts: Iterator[pb.StepPlans], context: grpc.ServicerContext) -> None:
        """A pipe is open as long as the call. Raises OSError when the engine's socket cannot be reached."""
        self.bursts = bursts
        self._answers: queue.SimpleQueue[pb.StepResults | None] = queue.SimpleQueue()
        self._pipe: Pipe | None = None
        if path := dict(context.invocation_metadata()).get(STEPS_KEY, ""):
            self._pipe = Pipe.connect(str(path))
            self.bursts = map(_plans, self._pipe.messages())
            if not context.add_callback(self._pipe.close):  # the call is over
                self._pipe.close()

    def answer(self, results: pb.StepResults) -> None:
        """Send results; once the engine is gone nobody misses them, and its plans end too."""
        if self._pipe is None:
            self._answers.put(results)
            return
        with contextlib.suppress(OSError):
            self._pipe.send(results.SerializeToString())

    def end(self) -> None:
        """No more results come."""
        if self._pipe is not None:
            self._pipe.close()
        self._answers.put(None)

    def through_call(self) -> Iterator[pb.StepResults]:
        """What the call itself carries, until `end`."""
        return iter(self._answers.get, None)


def _plans(message: bytes) -> pb.StepPlans:
    """Raises ValueError, as every message that is not a plan does."""
    try:
        return pb.StepPlans.FromString(message)
    except DecodeError as error:
        raise ValueError(error) from error
