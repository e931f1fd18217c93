"""Messages between two processes of one node: a Unix socket in a private folder, a length and bytes each time.

Plans and results of near stages go this way. A message wakes one thread here; in gRPC for Python it takes five through
both processes, on the cores that compute.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from protos.stage.channel import MAX_MESSAGE

STEPS_KEY = "longreach-steps"  # metadata of a Run call: the socket its plans and results go through
_LENGTH = struct.Struct("<I")
_READ = 1 << 16


class Pipe:
    """One end of a connection; one thread may read and another one write."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def connect(cls, path: str) -> Pipe:
        """Reach who listens at `path`. Raises OSError."""
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(path)
        except OSError:
            end.close()
            raise
        return cls(end)

    def send(self, message: bytes) -> None:
        """Write a message; waits while the other end does not read. Raises OSError when it is gone."""
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def messages(self) -> Iterator[bytes]:
        """What comes, in order, until either end closes. Raises ValueError for a length no message has."""
        data = bytearray()
        while True:
            while len(data) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(data)
                if length > MAX_MESSAGE:
                    raise ValueError(f"a message of {length} bytes: must have at most {MAX_MESSAGE}")
                stop = _LENGTH.size + length
                if len(data) < stop:
                    break
                yield bytes(data[_LENGTH.size : stop])
                del data[:stop]
            try:
                came = self._socket.recv(_READ)
            except OSError:
                return
            if not came:
                return
            data += came

    def close(self) -> None:
        """End the connection and wake who waits at it; may be called twice, by any thread.

        The descriptor goes with the object: given back earlier, its number could be another file's while one writes.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        self._socket.close()


class PipeDoor:
    """Where one other process connects, once."""

    def __init__(self, path: str) -> None:
        """Listen at `path`; what a dead process has left there is replaced. Raises OSError."""
        self.path = path
        Path(path).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(path)
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise

    def accept(self, timeout_s: float) -> Pipe:
        """The end of who connects. Raises TimeoutError."""
        self._listener.settimeout(timeout_s)
        end, _ = self._listener.accept()
        end.settimeout(None)
        return Pipe(end)

    def close(self) -> None:
        """Listen no longer; connections stay."""
        self._listener.close()
        Path(self.path).unlink(missing_ok=True)
