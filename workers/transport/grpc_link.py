"""Links carry hidden states from one stage to the next, and sampled tokens from the last one to the first.

They work in one process or over gRPC.

A link is a bounded queue: when the next stage is behind by `DEPTH` steps, `send` waits. gRPC's own flow control extends
this across processes, since the receiver stops reading while its inbox is full.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import grpc
import torch

from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import open_channel, token_metadata
from workers.transport.frames import Assembler, Frame, split

DEPTH = 4  # steps in flight on a link before the sender waits
T = TypeVar("T")


class LinkClosed(RuntimeError):
    """The other end is gone or the link was closed."""


class Sender(Protocol):
    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Queue the activations of a step; waits while the link is full, raises LinkClosed when it is broken."""

    def close(self) -> None:
        """Stop; may be called twice."""


class Source(Protocol):
    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What the stage before made of a step, of the shape and type the plan tells. Raises LinkClosed."""


class Mailbox(Generic[T]):
    """A bounded queue that can be closed: writers wait while it is full, closing wakes everybody at once."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._reason: str | None = None

    def put(self, item: T) -> None:
        """Add an item; waits while `depth` items are unread. Raises LinkClosed when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._reason is not None or len(self._items) < self._depth)
            if self._reason is not None:
                raise LinkClosed(self._reason)
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout_s: float | None = None) -> T:
        """The oldest item. Raises TimeoutError, or LinkClosed when closed and empty."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._reason is not None, timeout_s):
                raise TimeoutError
            if not self._items:
                raise LinkClosed(str(self._reason))
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self, reason: str = "closed") -> None:
        """No more items come; the first reason stays."""
        with self._changed:
            if self._reason is None:
                self._reason = reason
            self._changed.notify_all()


class Inbox:
    """Where a stage takes what the stage before it made of its steps, in order."""

    def __init__(self, what: str = "activations", source: str = "the previous stage", depth: int = DEPTH) -> None:
        """Args: `what` it takes and from whom, for messages; `depth` steps are held before the sender waits."""
        self.source = source
        self._what = what
        self._steps: Mailbox[tuple[int, torch.Tensor]] = Mailbox(depth)

    def put(self, step: int, tensor: torch.Tensor) -> None:
        """Deliver a step; waits while the stage is behind. Raises LinkClosed."""
        self._steps.put((step, tensor))

    def take(
        self, step: int, timeout_s: float, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """What came of `step`; a shape and a type are checked when given.

        Raises:
            LinkClosed: the link broke, the step did not come in time, or something else came.
        """
        try:
            came, tensor = self._steps.get(timeout_s)
        except TimeoutError:
            raise LinkClosed(f"{self._what} of step {step} did not come within {timeout_s:g} s") from None
        if came != step:
            raise LinkClosed(f"{self._what} of step {came} came where step {step} was due")
        if (shape and tuple(shape) != tuple(tensor.shape)) or (dtype and dtype != tensor.dtype):
            raise LinkClosed(
                f"{self._what} of step {step} are {tensor.dtype} {list(tensor.shape)} where "
                f"{dtype} {list(shape or ())} were due"
            )
        return tensor

    def close(self, reason: str = "closed") -> None:
        self._steps.close(reason)


class GrpcSender:
    """Streams to the same rank of the next stage (after the last: the first); compute goes on while bytes travel."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = open_channel(address)
        self._outbox: Mailbox[tuple[int, torch.Tensor]] = Mailbox()
        call = rpc.StageStub(self._channel).Activations.future(self._frames(), metadata=token_metadata(token))
        call.add_done_callback(self._on_done)

    def send(self, step: int, tensor: torch.Tensor) -> None:
        self._outbox.put((step, tensor))

    def close(self) -> None:
        self._outbox.close()
        self._channel.close()

    def _frames(self) -> Iterator[pb.Frame]:
        while True:
            try:
                step, tensor = self._outbox.get()
            except LinkClosed:
                return
            for frame in split(tensor, step):
                yield frame_to_pb(frame)

    def _on_done(self, call: grpc.Future) -> None:
        if call.cancelled():
            self._outbox.close("link to the next stage cancelled")
        elif (error := call.exception()) is not None:
            details = error.details() if isinstance(error, grpc.Call) else str(error)
            self._outbox.close(f"link to the next stage broke: {details}")
        else:
            self._outbox.close("the next stage ended the stream")


def receive_frames(frames: Iterator[pb.Frame], inbox: Inbox) -> None:
    """Feed a stream of frames into an inbox until the stream ends.

    Raises:
        FrameError: a frame is damaged; LinkClosed: the inbox was closed.
    """
    assembler = Assembler()
    for message in frames:
        done = assembler.add(frame_from_pb(message))
        if done is not None:
            inbox.put(*done)


def frame_to_pb(frame: Frame) -> pb.Frame:
    return pb.Frame(
        step=frame.step, index=frame.index, count=frame.count, dtype=frame.dtype,
        shape=frame.shape, crc32=frame.crc32, payload=frame.payload,
    )  # fmt: skip


def frame_from_pb(message: pb.Frame) -> Frame:
    return Frame(
        message.step, message.index, message.count, message.dtype, tuple(message.shape),
        message.crc32, message.payload,
    )  # fmt: skip
