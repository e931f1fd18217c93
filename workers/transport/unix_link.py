"""Links between neighbours on one node: Unix sockets in the launch's private folder, read by the thread that computes.

A message is a header (step and CRC-32 as int64) and the bytes of one tensor. The receiver knows type and
shape from its plan: a step takes one message and wakes no other thread of ours. A peer that dies is an error at once,
and closing an end wakes whoever waits at it. Short messages go through compiled functions (`unix_link_compiled`); what
is here in Python is their twin.
"""

from __future__ import annotations

import contextlib
import functools
import math
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from workers.transport import unix_link_compiled
from workers.transport.grpc_link import DEPTH, LinkClosed

_HEADER = 64  # bytes, of which 16 are used: what follows stays aligned
_FIELDS = struct.Struct("<2q")
_INT64 = 8


class NearSender:
    """The sending end; what the socket does not take at once follows by itself, compute goes on meanwhile."""

    def __init__(self, path: str, depth: int = DEPTH) -> None:
        """Connect to the `NearInbox` that listens at `path`; `depth` messages may be under way before `send` waits.

        Raises:
            LinkClosed: nobody listens there.
        """
        self._depth = depth
        self._changed = threading.Condition()
        self._left: deque[memoryview] = deque()  # what is still to be written, the oldest of it perhaps in part
        self._error = ""
        self._writer: threading.Thread | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise LinkClosed(f"the next stage does not listen: {error}") from error

    def early(self, step: int, tensor: torch.Tensor) -> unix_link_compiled.Early | None:
        """The message of a step, for whoever fills `tensor` to send; None where it must take the usual way."""
        size = _HEADER + tensor.numel() * tensor.element_size()
        if self._left or self._error or not unix_link_compiled.serves(size):
            return None
        return unix_link_compiled.Early(self._socket.fileno(), tensor, step, _seed(tensor.dtype, tensor.shape))

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Send the tensor of a step. Raises LinkClosed when the other end is gone."""
        tensor = tensor.detach().contiguous()
        with self._changed:
            if len(self._left) >= self._depth:
                self._changed.wait_for(lambda: self._error or len(self._left) < self._depth)
            if self._error:
                raise LinkClosed(self._error)
            if (message := self.early(step, tensor)) is not None:
                unix_link_compiled.send(message)
                self._finish(message)
                return
            data = _message(tensor, step, _seed(tensor.dtype, tensor.shape))
            self._queue(data if self._left else data[self._write(data, socket.MSG_DONTWAIT) :])

    def finish(self, message: unix_link_compiled.Early) -> None:
        """See to what of an early message is not on its way yet. Raises LinkClosed when the other end is gone."""
        with self._changed:
            self._finish(message)

    def _finish(self, message: unix_link_compiled.Early) -> None:
        with self._breaking():
            written = unix_link_compiled.sent(message)
        if written < _HEADER + message.call.bytes:
            self._queue(_message(message.body, message.step, message.seed)[written:])

    def _queue(self, rest: memoryview) -> None:
        """Have the rest of a message written by a thread; the condition is held."""
        if not rest:
            return
        self._left.append(rest)
        self._changed.notify_all()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_rest, name="near link", daemon=True)
            self._writer.start()

    def close(self) -> None:
        with self._changed:
            self._error = self._error or "closed"
            self._left.clear()
            self._changed.notify_all()
        _wake(self._socket)

    def __del__(self) -> None:
        self._socket.close()  # not earlier: the number could be another file's while a step still sends

    def _write(self, data: memoryview, flags: int = 0) -> int:
        with self._breaking():
            try:
                return self._socket.send(data, flags | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return 0

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """An error of the socket ends the link."""
        try:
            yield
        except OSError as error:
            self._error = self._error or f"link to the next stage broke: {error}"
            raise LinkClosed(self._error) from error

    def _write_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._error or self._left)
                if self._error:
                    return
                data = self._left[0]
            try:
                written = self._write(data)
            except LinkClosed:
                written = 0
            with self._changed:
                if self._left and written < len(data):
                    self._left[0] = data[written:]
                elif self._left:
                    self._left.popleft()
                self._changed.notify_all()


class NearInbox:
    """The receiving end, which listens from the start."""

    def __init__(self, path: str, what: str = "activations", source: str = "the previous stage") -> None:
        """Args: `path` of the socket, which must be new; `what` it takes and from whom, for messages.

        Raises:
            OSError: the socket cannot be made.
        """
        self._what = what
        self._source = source
        self._path = path
        self._link: socket.socket | None = None
        self._closed = False
        self._taking = threading.Lock()
        self._rhythm = unix_link_compiled.Rhythm()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What came of `step`, which has this shape and type.

        Raises:
            LinkClosed: the other end is gone, nothing came in time, something else came, or this end was closed.
        """
        message = torch.empty(_HEADER + math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        body = message[_HEADER:].view(dtype).view(tuple(shape))
        seed = _seed(dtype, tuple(shape))
        until = time.monotonic() + timeout_s
        try:
            with self._taking:
                link = self._connected(timeout_s)
                if unix_link_compiled.serves(message.numel()):
                    fits = unix_link_compiled.take(
                        link.fileno(), message, step, seed, until - time.monotonic(), self._rhythm
                    )
                else:
                    _fill(link, message.numpy().data, until)
                    fits = False  # as far as is known
        except TimeoutError as error:
            raise LinkClosed(f"{self._what} of step {step} did not come within {timeout_s:g} s") from error
        except OSError as error:
            raise LinkClosed("closed" if self._closed else f"{self._source} is gone: {error}") from error
        if not fits:
            self._check(message.numpy(), step, seed)
        return body

    def close(self) -> None:
        """End the link and wake who waits at it; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._link is not None:
            _wake(self._link)
        else:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as visitor:
                visitor.connect(self._path)
        with self._taking:  # nobody reads from a descriptor that may soon be another file
            self._listener.close()
            if self._link is not None:
                self._link.close()
        Path(self._path).unlink(missing_ok=True)

    def _connected(self, timeout_s: float) -> socket.socket:
        if self._link is None:
            self._listener.settimeout(timeout_s)
            self._link, _ = self._listener.accept()
        if self._closed:
            raise ConnectionAbortedError
        return self._link

    def _check(self, message: np.ndarray, step: int, seed: int) -> None:
        came, crc = _FIELDS.unpack_from(message)  # type: ignore[arg-type]
        if came != step:
            raise LinkClosed(f"{self._what} of step {came} came where step {step} was due")
        if _checksum(message, seed) != crc:
            raise LinkClosed(f"{self._what} of step {step} are damaged (checksum differs)")


def _fill(link: socket.socket, rest: memoryview, until: float) -> None:
    while rest:
        link.settimeout(max(1e-3, until - time.monotonic()))
        count = link.recv_into(rest)
        if not count:
            raise ConnectionResetError("it ended the link")
        rest = rest[count:]


def _wake(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected, or closed before
        end.shutdown(socket.SHUT_RDWR)


def _message(tensor: torch.Tensor, step: int, seed: int) -> memoryview:
    body = tensor.view(-1).view(torch.uint8).numpy()
    message = np.empty(_HEADER + body.size, np.uint8)
    message[_HEADER:] = body
    _FIELDS.pack_into(message, 0, step, 0)  # type: ignore[arg-type]
    _FIELDS.pack_into(message, 0, step, _checksum(message, seed))  # type: ignore[arg-type]
    return message.data


def _checksum(message: np.ndarray, seed: int) -> int:
    """CRC-32 over step and body, begun with what the bytes are."""
    return zlib.crc32(message[_HEADER:], zlib.crc32(message[:_INT64], seed))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _seed(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """A payload taken for another type or shape does not pass."""
    return zlib.crc32(f"{dtype} {tuple(shape)}".encode())
