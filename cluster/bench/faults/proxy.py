"""A relay between two TCP or Unix sockets that can lose, delay, cut and reorder what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

Address = tuple[str, int] | str  # of TCP, or the path of a Unix socket
Way = Literal["out", "back"]  # from who connected to the target, and the answers
_PIECE = 1 << 16


def connect(address: Address) -> socket.socket:
    """Return a connected socket."""
    end = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    end.connect(address)
    return end


class Proxy:
    """Listens at one address and relays each connection to a target, under rules that may change at any time.

    Attributes:
        lost: ways on which bytes are swallowed; the connection stays open.
        delay_s: before each piece is passed on.
        swap: called with each piece of the way out; returns the pieces to send in its place, in their order.
    """

    def __init__(self, listen: Address, target: Callable[[], Address]) -> None:
        """Args: target: asked anew for every connection."""
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX if isinstance(listen, str) else socket.AF_INET)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(listen)
        self._listener.listen(64)
        self.address: Address = listen if isinstance(listen, str) else self._listener.getsockname()
        self.lost: set[Way] = set()
        self.delay_s = 0.0
        self.swap: Callable[[bytes], list[bytes]] | None = None
        self.refusing = False
        self.passed: dict[Way, int] = {"out": 0, "back": 0}
        self._ends: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut(self) -> int:
        """End all connections at once; return how many there were."""
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(ends) // 2

    def heal(self) -> None:
        """Pass everything on from now; connections that lost bytes are cut, since the rest would make no sense."""
        was_lossy, self.lost, self.delay_s, self.swap, self.refusing = bool(self.lost), set(), 0.0, None, False
        if was_lossy:
            self.cut()

    def close(self) -> None:
        """Stop listening and end all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.cut()
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.refusing:
                    raise ConnectionRefusedError
                far = connect(self._target())
            except OSError:
                near.close()
                continue
            with self._lock:
                self._ends |= {near, far}
            for source, sink, way in ((near, far, "out"), (far, near, "back")):
                threading.Thread(target=self._relay, args=(source, sink, way), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        try:
            while data := source.recv(_PIECE):
                if self.delay_s:
                    time.sleep(self.delay_s)
                if way in self.lost:
                    continue
                for piece in self.swap(data) if self.swap and way == "out" else (data,):
                    sink.sendall(piece)
                    self.passed[way] += len(piece)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def swap_once(size_of: Callable[[bytes], int | None]) -> Callable[[bytes], list[bytes]]:
    """Return a function for `Proxy.swap` that exchanges two neighbouring frames of a stream, once.

    Args:
        size_of: the length of the frame that begins the bytes; None: more bytes are needed to know.
    """
    rest = bytearray()
    frames: list[bytes] = []
    done = False

    def swap(data: bytes) -> list[bytes]:
        nonlocal done
        if done:
            return [data]
        rest.extend(data)
        while (size := size_of(bytes(rest[:256]))) is not None and len(rest) >= size:
            frames.append(bytes(rest[:size]))
            del rest[:size]
        if len(frames) < 2:
            return []
        done = True
        return [frames[1], frames[0], *frames[2:], bytes(rest)]

    return swap
