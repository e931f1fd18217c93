"""The process that renders chat templates, as its owner sees it: one child, bounded in time, memory and output."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jinja2
import markupsafe

from cluster.common.text_format import one_line
from cluster.text.templates.worker import Request
from protos.errors import UserError

_START_SECONDS = 60.0  # for an interpreter and its imports, on a busy machine
_SLOW_SECONDS = 1.0
_MAX_WAITING = 4  # requests behind one that is slow
_REASON_CHARS = 200
_CHUNK_BYTES = 1 << 20
_CPU_TIME = "takes too much processor time"
# Isolated and without `site`: no variable and no start-up file of ours reaches it. It imports what we import.
_PROGRAM = (
    "import sys; sys.path += sys.argv[3:]\n"
    "from cluster.text.templates.worker import main\n"
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)
_PACKAGES = (jinja2, markupsafe)


class ChatTemplateError(UserError):
    """A chat template that is missing, cannot be rendered, or does not show the messages as it must."""


class RendererBusy(UserError):
    """Other requests keep the process that renders; try again in a moment."""


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may take."""

    seconds: float = 10.0
    memory_bytes: int = 512 << 20


class TemplateProcess:
    """Renders chat templates in a child process; any thread may call `render`, one at a time is served.

    The child is started with the first request and kept. One that exceeds a limit is killed, as is one that dies found
    and reaped; the next request has a new one. It ends with this process.
    """

    def __init__(self, limits: RenderLimits = RenderLimits()) -> None:
        self._limits = limits
        self._rendering = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._began: float | None = None  # the rendering that is going on
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def render(self, request: Request) -> str:
        """Return the text of a template.

        Raises:
            ChatTemplateError: the template fails or exceeds a limit. RendererBusy: other requests take too long.
        """
        message = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with self._turn():
            try:
                kind, content = self._exchange(message, 4 * request["max_chars"])
                if kind == b"M":
                    raise _failure(f"needs more than {self._limits.memory_bytes >> 20} MiB of memory")
            except BaseException:
                self._stop()
                raise
        text = content.decode("utf-8", "surrogatepass")
        if kind != b"T":
            raise _failure(one_line(text, _REASON_CHARS))
        return text

    def close(self) -> None:
        """End the child; a later `render` starts another."""
        with self._rendering:
            self._stop()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the child; not behind several others when a rendering is slow already."""
        with self._counting:
            is_slow = self._began is not None and time.monotonic() - self._began > _SLOW_SECONDS
            if is_slow and self._waiting >= _MAX_WAITING:
                raise RendererBusy("chat_template: other requests take long to be rendered: try again")
            self._waiting += 1
        try:
            if not self._rendering.acquire(timeout=self._limits.seconds):
                raise RendererBusy("chat_template: other requests take long to be rendered: try again")
        finally:
            with self._counting:
                self._waiting -= 1
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None
            self._rendering.release()

    def _exchange(self, message: bytes, max_bytes: int) -> tuple[bytes, bytearray]:
        """Send a request and return its reply, from another child if the one that waited for it is dead."""
        is_new = self._child is None
        try:
            if is_new:
                self._start()
            assert self._socket is not None
            until = time.monotonic() + self._limits.seconds
            self._socket.settimeout(self._limits.seconds)
            self._socket.sendall(b"Q" + len(message).to_bytes(8, "big"))
            self._socket.sendall(message)
            return self._receive(until, max_bytes)
        except TimeoutError:
            raise _failure(f"takes more than {self._limits.seconds:g} s") from None
        except (OSError, EOFError) as error:
            reason = self._describe_end() if self._child is not None else str(error)
        if is_new or reason == _CPU_TIME:
            raise _failure(reason)
        self._stop()
        return self._exchange(message, max_bytes)

    def _receive(self, until: float, max_bytes: int) -> tuple[bytes, bytearray]:
        header = self._read(9, until)
        size = int.from_bytes(header[1:], "big")
        if size > max(max_bytes, 1 << 16):
            raise ChatTemplateError(f"chat_template: a reply of {size} bytes: at most {max_bytes}")
        return bytes(header[:1]), self._read(size, until)

    def _read(self, size: int, until: float) -> bytearray:
        assert self._socket is not None
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            if not (chunk := self._socket.recv(min(size - len(data), _CHUNK_BYTES))):
                raise EOFError
            data += chunk
        return data

    def _start(self) -> None:
        """Start a child and wait until it is ready."""
        paths = [Path(__file__).parents[3], *(Path(package.__file__ or "").parents[1] for package in _PACKAGES)]
        cpu_seconds = int(self._limits.seconds) + 2  # beyond the deadline: for a child whose owner is gone
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(self._limits.memory_bytes), str(cpu_seconds)]
        environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self._socket, theirs = socket.socketpair()
        with theirs:  # no fork beside running threads: without a function of ours in between it is a vfork
            self._child = subprocess.Popen(
                [*command, *dict.fromkeys(map(str, paths))], stdin=theirs.fileno(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, cwd="/", env=environment, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._child.wait, name="template-reaper", daemon=True).start()
        try:
            self._receive(time.monotonic() + _START_SECONDS, 0)
        except TimeoutError:
            raise _failure(f"the process that renders it did not start within {_START_SECONDS:g} s") from None

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.kill()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(10.0)
        self._socket = self._child = None

    def _describe_end(self) -> str:
        """Return how the child ended; kills one that has closed its socket and goes on."""
        assert self._child is not None
        try:
            code = self._child.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the process that renders it does not answer"
        if code == -signal.SIGXCPU:
            return _CPU_TIME
        return f"the process that renders it ended ({signal.Signals(-code).name if code < 0 else f'code {code}'})"


def _failure(reason: str) -> ChatTemplateError:
    return ChatTemplateError(f"chat_template: cannot be rendered: {reason}")


renderer = TemplateProcess()
atexit.register(renderer.close)
