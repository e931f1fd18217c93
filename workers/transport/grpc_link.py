"""Links over gRPC, between nodes.

The sender streams frames, the receiver's `Activations` call puts them into an inbox. gRPC's own flow control extends
the bound of the link across processes, since a receiver stops reading while its inbox is full.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import grpc
import torch

from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import open_channel, token_metadata
from workers.transport.frames import Assembler, Frame, split
from workers.transport.interface import DEPTH, LinkClosed, check_due, overdue

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A bounded queue that can be closed: writers wait while it is full, closing wakes everybody at once."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._reason: str | None = None

    def put(self, item: T) -> None:
        """Add an item; waits while `depth` items are unread.

        Raises:
            LinkClosed: the box is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._reason is not None or len(self._items) < self._depth)
            if self._reason is not None:
                raise LinkClosed(self._reason)
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout_s: float | None = None) -> T:
        """Return the oldest item.

        Raises:
            TimeoutError: none came. LinkClosed: the box is closed and empty.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._reason is not None, timeout_s):
                raise TimeoutError
            if not self._items:
                raise LinkClosed(str(self._reason))
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self, reason: str = "closed") -> None:
        """Refuse further items; the first reason stays."""
        with self._changed:
            if self._reason is None:
                self._reason = reason
            self._changed.notify_all()


class GrpcInbox:
    """The receiving end: tensors wait here for the stage that takes them."""

    def __init__(self, content: str = "activations", source: str = "the previous stage", depth: int = DEPTH) -> None:
        """Args: `content` and `source` are for error messages; `depth` tensors are held before the sender waits."""
        self.source = source
        self._content = content
        self._tensors: Mailbox[tuple[int, torch.Tensor]] = Mailbox(depth)

    def put(self, step: int, tensor: torch.Tensor) -> None:
        """Deliver the tensor of a step; waits while the stage is behind.

        Raises:
            LinkClosed: the inbox is closed.
        """
        self._tensors.put((step, tensor))

    def receive(self, frames: Iterator[pb.Frame]) -> None:
        """Assemble and deliver what a stream brings until it ends.

        Raises:
            FrameError: a frame is damaged. LinkClosed: the inbox is closed.
        """
        assembler = Assembler()
        for frame in frames:
            if (complete := assembler.add(frame.data)) is not None:
                self.put(*complete)

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Inbox`."""
        try:
            received = self._tensors.get(timeout_s)
        except TimeoutError:
            raise overdue(self._content, step, timeout_s) from None
        return check_due(self._content, *received, step, shape, dtype)

    def close(self, reason: str = "closed") -> None:
        """See `Inbox`; what is here can still be taken."""
        self._tensors.close(reason)


class GrpcSender:
    """The sending end: streams to the same rank of the next stage; compute goes on while bytes travel."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = open_channel(address)
        self._outbox: Mailbox[Iterator[Frame]] = Mailbox()
        call = rpc.StageStub(self._channel).Activations.future(self._frames(), metadata=token_metadata(token))
        call.add_done_callback(self._on_done)

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """See `Sender`."""
        self._outbox.put(split(tensor, step))

    def close(self) -> None:
        """See `Sender`."""
        self._outbox.close()
        self._channel.close()

    def _frames(self) -> Iterator[pb.Frame]:
        with contextlib.suppress(LinkClosed):
            while True:
                for frame in self._outbox.get():
                    yield pb.Frame(data=b"".join(frame))

    def _on_done(self, call: grpc.Future) -> None:
        if call.cancelled():
            self._outbox.close("link to the next stage cancelled")
        elif (error := call.exception()) is not None:
            details = error.details() if isinstance(error, grpc.Call) else str(error)
            self._outbox.close(f"link to the next stage broke: {details}")
        else:
            self._outbox.close("the next stage ended the stream")
