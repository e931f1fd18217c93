"""Links between neighbouring stages: one-way streams of tensors, cut into frames.

Links carry hidden states from one stage to the next, and sampled tokens from the last stage to the first. On one node
a link is a Unix socket in the launch's private folder. Between nodes a gRPC stream carries the same bytes over TLS
(`protos.stage.identity`), from a socket in the sending process to one in the receiving process. The thread that
computes reads and writes the sockets itself, so a decode step on one node wakes no other thread. A peer that dies is an
error at once, closing an end wakes whoever waits at it, and a receiver that is behind makes `send` wait.

Both ends of a link are of one epoch. Who connects from an earlier one, a process that was replaced and lives on, is
turned away, and its frames are dropped; both are counted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
import torch

from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import call_metadata, explain_loss, open_channel
from protos.stage.identity import Identity
from workers.transport.frames import FrameError, Header, announce, read_announcement, read_tensor, split

T = TypeVar("T")
DEPTH = 4  # tensors that may be unwritten before the sender waits
_PIECE = 2 * 1024 * 1024  # largest number of bytes of a stream in one gRPC message
_HELLO = struct.Struct("<4sI")  # the first bytes on a Unix socket: a mark, and the epoch of who connects
_MARK = b"LRlk"
_HELLO_S = 5.0  # who connects and says nothing for this long is turned away


class LinkClosed(RuntimeError):
    """The other end is gone, something else than what was due came, or the link was closed."""


class Sender:
    """The sending end; what its socket does not take at once is written by a thread while compute goes on."""

    def __init__(self, end: socket.socket, depth: int = DEPTH, epoch: int = 0) -> None:
        self._end = end
        self._depth = depth
        self._epoch = epoch
        self._reason = ""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="link")
        self._unwritten: deque[Future[None]] = deque()

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Queue the tensor of a step, which must not change any more; waits while the link is full.

        Raises:
            LinkClosed: the receiver is gone.
        """
        self._queue(split(tensor, step, epoch=self._epoch))

    def announce(self, step: int, tensor: torch.Tensor) -> None:
        """Queue the announcement of a tensor that goes another way. Waits and raises as `send`."""
        self._queue(iter([announce(tensor, step, self._epoch)]))

    def _queue(self, frames: Iterator[bytes]) -> None:
        if self._reason:
            raise LinkClosed(self._reason)
        try:
            while self._unwritten and (len(self._unwritten) == self._depth or self._unwritten[0].done()):
                self._unwritten.popleft().result()
            frame, written = next(frames), 0
            if not self._unwritten:
                with contextlib.suppress(BlockingIOError):
                    written = self._end.send(frame, socket.MSG_DONTWAIT)
            if rest := frame[written:] or next(frames, b""):
                self._unwritten.append(self._writer.submit(self._write, itertools.chain([rest], frames)))
        except OSError as error:
            raise LinkClosed(self._reason or f"link to the next stage broke: {error}") from error

    def close(self, reason: str = "closed") -> None:
        """Stop; may be called twice, the first reason stays."""
        self._reason = self._reason or reason
        _shut_down(self._end)

    def __del__(self) -> None:
        self._end.close()  # not earlier: the number could be another file's while a step still sends

    def _write(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            self._end.sendall(frame)


class UnixSender(Sender):
    """The sender to a stage of this node."""

    def __init__(self, path: str, depth: int = DEPTH, epoch: int = 0) -> None:
        """Connect to the `Inbox` that listens at `path`.

        Raises:
            LinkClosed: nobody listens there.
        """
        super().__init__(socket.socket(socket.AF_UNIX), depth, epoch)
        try:
            self._end.connect(path)
            self._end.sendall(_HELLO.pack(_MARK, epoch))
        except OSError as error:
            raise LinkClosed(f"the next stage does not listen: {error}") from error


class GrpcSender(Sender):
    """The sender to a stage of another node: an `Activations` call streams what is written to the socket."""

    def __init__(
        self, address: str, token: str, depth: int = DEPTH, epoch: int = 0, identity: Identity | None = None,
        name: str = "",
    ) -> None:  # fmt: skip
        """Connect to the process at `address`. Args: `identity`, `name` as of `open_channel`."""
        end, self._exit = socket.socketpair()
        super().__init__(end, depth, epoch)
        self._explain = functools.partial(explain_loss, address=address, is_secure=identity is not None)
        self._channel = open_channel(address, identity, name)
        call = rpc.StageStub(self._channel).Activations.future(self._pieces(), metadata=call_metadata(token, epoch))
        call.add_done_callback(self._on_done)

    def close(self, reason: str = "closed") -> None:
        """See `Sender`."""
        super().close(reason)
        self._channel.close()

    def _pieces(self) -> Iterator[pb.Frame]:
        while data := self._exit.recv(_PIECE):
            yield pb.Frame(data=data)

    def _on_done(self, call: grpc.Future) -> None:
        reason = "link to the next stage cancelled"
        if not call.cancelled():
            error = call.exception()
            details = self._explain(error.details() or "") if isinstance(error, grpc.Call) else error
            reason = f"link to the next stage broke: {details}"
        super().close(reason)


class Inbox:
    """The receiving end: takes what comes to the Unix socket it listens on, or to `entry`."""

    def __init__(
        self, content: str = "activations", source: str = "the previous stage", path: str = "", epoch: int = 0,
        on_late: Callable[[], object] = lambda: None, pin: bool = False,
    ) -> None:  # fmt: skip
        """Listen at `path`, which must be new, or read what is written to `entry`.

        Args:
            content, source: for error messages.
            on_late: called for every frame and every visitor of an earlier epoch.
            pin: put tensors into pinned memory, for a stage on a GPU.

        Raises:
            OSError: the socket cannot be made.
        """
        self._content = content
        self._source = source
        self._path = path
        self._epoch = epoch
        self._on_late = on_late
        self._pin = pin
        self._reason = ""
        self._is_damaged = False
        self._closed = threading.Event()
        self._taking = threading.Lock()
        self.entry: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._link: socket.socket | None = None
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen(8)
        else:
            self._link, self.entry = socket.socketpair()

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of a step, which must have this shape and type.

        Raises:
            LinkClosed: the sender is gone, nothing came in time, or something else came.
        """
        until = time.monotonic() + timeout_s
        try:
            received, tensor = self._read(lambda fill: read_tensor(fill, self._epoch, self._on_late, self._pin), until)
        except TimeoutError as error:
            raise LinkClosed(f"{self._content} of step {step} did not come within {timeout_s:g} s") from error
        check_due(self._content, (step, shape, dtype), (received, tensor.shape, tensor.dtype))
        return tensor

    def check(self) -> None:
        """Do nothing: what `take` returns has come. See `DeviceInbox.check`."""

    def take_announcement(self) -> Header:
        """Return what the next announcement says; waits for it without a limit. Raises LinkClosed as `take`."""
        return self._read(lambda fill: read_announcement(fill, self._epoch, self._on_late), None)

    def _read(self, read: Callable[[Callable[[memoryview], None]], T], until: float | None) -> T:
        """Return what `read` makes of the stream. Raises LinkClosed; TimeoutError at `until`, the monotonic clock's."""
        try:
            with self._taking:
                return read(lambda room: self._fill(room, until))
        except TimeoutError:
            raise
        except FrameError as error:
            self._is_damaged = True
            self.close(f"{self._content}: {error}")
            raise LinkClosed(self._reason) from error
        except OSError as error:
            raise LinkClosed(self._reason or f"{self._source} is gone: {error}") from error

    def feed(self, pieces: Iterable[bytes]) -> tuple[str, bool]:
        """Write what a gRPC stream brings to `entry`, and wait until this end is closed.

        Returns:
            Why it closed, and whether the reason is that something damaged came.
        """
        assert self.entry is not None, "it listens at a path"
        try:
            for piece in pieces:
                self.entry.sendall(piece)
        except OSError:
            pass  # this end is closed
        finally:
            _shut_down(self.entry)
        self._closed.wait()
        return self._reason, self._is_damaged

    def close(self, reason: str = "closed") -> None:
        """End the link and wake who waits at it; may be called twice, the first reason stays."""
        self._reason = self._reason or reason
        if self._link is not None:
            _shut_down(self._link)
        elif not self._closed.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as visitor:
                visitor.connect(self._path)
        self._closed.set()
        with self._taking:  # nobody reads from a descriptor that may soon be another file
            for end in (self._listener, self._link):
                if end is not None:
                    end.close()
        if self._path:
            Path(self._path).unlink(missing_ok=True)

    def __del__(self) -> None:
        if self.entry is not None:
            self.entry.close()  # not earlier, see `Sender`

    def _fill(self, room: memoryview, until: float | None) -> None:
        """Read until `room` is full. Raises OSError: TimeoutError at `until`, the monotonic clock's."""
        while self._link is None:
            self._link = self._accept(until)
        _read(self._link, room, until)

    def _accept(self, until: float | None) -> socket.socket | None:
        """Return the link to the next visitor, None if it is not of this epoch. Raises as `_fill`."""
        assert self._listener is not None
        self._listener.settimeout(_left(until))
        visitor, _ = self._listener.accept()
        if self._reason:
            visitor.close()
            raise ConnectionAbortedError
        hello = memoryview(bytearray(_HELLO.size))
        with contextlib.suppress(OSError):
            _read(visitor, hello, time.monotonic() + _HELLO_S)
        if _HELLO.unpack(hello) == (_MARK, self._epoch):
            return visitor
        visitor.close()
        self._on_late()
        return None


def check_due(
    content: str, due: tuple[int, Sequence[int], torch.dtype], came: tuple[int, Sequence[int], torch.dtype]
) -> None:
    """Compare step, shape and type of a tensor with what a plan needs. Raises LinkClosed: they differ."""
    (step, shape, dtype), (received, came_shape, came_dtype) = due, came
    if received != step:
        raise LinkClosed(f"{content} of step {received} came where step {step} was due")
    if (tuple(shape), dtype) != (tuple(came_shape), came_dtype):
        raise LinkClosed(
            f"{content} of step {step} are {came_dtype} {list(came_shape)} where {dtype} {list(shape)} were due"
        )


def _left(until: float | None) -> float | None:
    """Return the time limit of a socket that ends at `until`."""
    return None if until is None else max(1e-3, until - time.monotonic())


def _read(end: socket.socket, room: memoryview, until: float | None) -> None:
    while room:
        end.settimeout(_left(until))
        count = end.recv_into(room)
        if not count:
            raise ConnectionResetError("it ended the link")
        room = room[count:]


def _shut_down(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected, or shut down before
        end.shutdown(socket.SHUT_RDWR)
