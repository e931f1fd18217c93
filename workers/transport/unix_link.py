"""Links between stages of one node: Unix sockets in the launch's private folder.

The thread that computes reads and writes them itself, so a decode step wakes no other thread. A peer that dies is an
error at once, and closing an end wakes whoever waits at it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from workers.transport.frames import HEADER_BYTES, Assembler, Frame, FrameError, split
from workers.transport.interface import DEPTH, LinkClosed, check_due, overdue


class _Message:
    """The frames of a tensor as far as they are not written yet."""

    def __init__(self, step: int, tensor: torch.Tensor) -> None:
        self._frames = split(tensor, step)
        self._frame: Frame | None = None  # written in part or not at all

    def write(self, end: socket.socket, flags: int = 0) -> None:
        """Write the rest. Raises OSError: BlockingIOError where the socket takes no more now."""
        while (frame := self._frame or next(self._frames, None)) is not None:
            self._frame = frame
            written = end.sendmsg(frame, (), flags | socket.MSG_NOSIGNAL)
            in_payload = max(0, written - len(frame.header))
            rest = Frame(frame.header[written:], frame.payload[in_payload:])
            self._frame = rest if any(rest) else None


class UnixSender:
    """The sending end; what the socket does not take at once is written by a thread while compute goes on."""

    def __init__(self, path: str, depth: int = DEPTH) -> None:
        """Connect to the `UnixInbox` that listens at `path`; `depth` tensors may be unwritten before `send` waits.

        Raises:
            LinkClosed: nobody listens there.
        """
        self._depth = depth
        self._changed = threading.Condition()
        self._unwritten: deque[_Message] = deque()
        self._error = ""
        self._writer: threading.Thread | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise LinkClosed(f"the next stage does not listen: {error}") from error

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """See `Sender`."""
        message = _Message(step, tensor)
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._unwritten) < self._depth)
            if not self._unwritten and self._write(message, socket.MSG_DONTWAIT):
                return
            if self._error:
                raise LinkClosed(self._error)
            self._unwritten.append(message)
            self._changed.notify_all()
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_rest, name="link", daemon=True)
                self._writer.start()

    def close(self) -> None:
        """See `Sender`."""
        with self._changed:
            self._error = self._error or "closed"
            self._changed.notify_all()
        _wake(self._socket)

    def __del__(self) -> None:
        self._socket.close()  # not earlier: the number could be another file's while a step still sends

    def _write(self, message: _Message, flags: int = 0) -> bool:
        """Write a message; returns whether it is written as a whole. An error of the socket ends the link."""
        if self._error:
            return False
        try:
            message.write(self._socket, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            self._error = self._error or f"link to the next stage broke: {error}"
            return False
        return True

    def _write_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._error or self._unwritten)
                if self._error:
                    self._changed.notify_all()
                    return
            self._write(self._unwritten[0])
            with self._changed:
                self._unwritten.popleft()
                self._changed.notify_all()


class UnixInbox:
    """The receiving end, which listens from the start."""

    def __init__(self, path: str, content: str = "activations", source: str = "the previous stage") -> None:
        """Listen at `path`, which must be new; `content` and `source` are for error messages.

        Raises:
            OSError: the socket cannot be made.
        """
        self._content = content
        self._source = source
        self._path = path
        self._link: socket.socket | None = None
        self._reason = ""
        self._taking = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Inbox`."""
        until = time.monotonic() + timeout_s
        try:
            with self._taking:
                received = self._receive(until)
        except TimeoutError as error:
            raise overdue(self._content, step, timeout_s) from error
        except FrameError as error:
            raise LinkClosed(f"{self._content}: {error}") from error
        except OSError as error:
            raise LinkClosed(self._reason or f"{self._source} is gone: {error}") from error
        return check_due(self._content, *received, step, shape, dtype)

    def close(self, reason: str = "closed") -> None:
        """See `Inbox`."""
        if self._reason:
            return
        self._reason = reason
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

    def _receive(self, until: float) -> tuple[int, torch.Tensor]:
        """Read one tensor and its step."""
        if self._link is None:
            self._listener.settimeout(max(1e-3, until - time.monotonic()))
            self._link, _ = self._listener.accept()
        if self._reason:
            raise ConnectionAbortedError
        assembler = Assembler()
        header = bytearray(HEADER_BYTES)
        complete = None
        while complete is None:
            _fill(self._link, memoryview(header), until)
            _fill(self._link, assembler.begin(header), until)
            complete = assembler.end()
        return complete


def _fill(link: socket.socket, room: memoryview, until: float) -> None:
    """Read until `room` is full. Raises OSError: TimeoutError at `until`, the monotonic clock's."""
    while room:
        link.settimeout(max(1e-3, until - time.monotonic()))
        count = link.recv_into(room)
        if not count:
            raise ConnectionResetError("it ended the link")
        room = room[count:]


def _wake(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected, or closed before
        end.shutdown(socket.SHUT_RDWR)
