"""A Ray on this machine for this process alone, and how this process talks to it.

Its daemons belong to a process of their own, `ray_owner`; everything it has listens on loopback. Who may talk to it
needs a secret that is made for each start and travels in the environment of Ray's processes only: no file of Ray's in
the home directory is read or written.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.common.errors import PlacementError
from cluster.stages.socket_dirs import RAY_FOLDER, RAY_LOG, RunDir, make_run_dir
from protos.node.environment import usable_cores

_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's minimum is 75 MB; nothing of ours goes through it
_CLOSE_TIMEOUT_S = 15.0
# Every setting of Ray's daemons that is made in their environment, with the reason; all else stays as Ray has it.
DAEMON_ENVIRONMENT = {
    "RAY_memory_monitor_refresh_ms": "0",  # it counts mapped weights and would kill stages; preflight budgets memory
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about this machine is sent to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: Ray's processes take loopback for this node's address
    "RAY_worker_niceness": "0",  # 15 otherwise: whatever else runs on the machine would go before the stages
    "RAY_AUTH_MODE": "token",
}
_OTHER_CLUSTERS = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN_PATH")  # not meant for this one


class LocalRay:
    """One start of a local Ray. `close` ends it and may be called twice."""

    def __init__(self, on_lost: Callable[[str], None]) -> None:
        """Start its owner; `address` waits for the rest.

        Args:
            on_lost: called at most once, on another thread, with the reason, when Ray ends before `close`.

        Raises:
            PreflightError: TMPDIR cannot hold its files.
        """
        self.token = secrets.token_hex(32)
        self._on_lost = on_lost
        self._folder: RunDir | None = make_run_dir()
        self._closing = threading.Event()
        self._first: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        try:
            self._owner = self._spawn(self._folder)
        except BaseException:
            self._folder.remove()
            raise
        self._follower = threading.Thread(target=self._follow, name="ray owner", daemon=True)
        self._follower.start()

    @property
    def folder(self) -> Path:
        """Where Ray keeps its files."""
        assert self._folder is not None, "it is closed"
        return self._folder.path / RAY_FOLDER

    def _spawn(self, folder: RunDir) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in _OTHER_CLUSTERS}
        environment |= DAEMON_ENVIRONMENT | {"RAY_AUTH_TOKEN": self.token}
        script = Path(__file__).with_name("ray_owner.py")
        sizes = (folder.lock, usable_cores(), _OBJECT_STORE_BYTES)
        command = [sys.executable, "-P", str(script), str(folder.path), *map(str, sizes)]
        with open(os.open(folder.path / RAY_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                pass_fds=[folder.lock], start_new_session=True,
            )  # fmt: skip

    def address(self, timeout_s: float) -> str:
        """Return its address once it runs. Raises PlacementError."""
        try:
            first = self._first.get(timeout=timeout_s)
        except queue.Empty as error:
            raise PlacementError(f"cluster.address: local: Ray did not start within {timeout_s:g} s") from error
        if "address" not in first:
            raise PlacementError(f"cluster.address: local: Ray did not start: {first['error']}")
        return first["address"]

    def close_folders(self) -> None:
        """Take from others what Ray has opened to them: it gives its folders mode 0777, also when a driver connects."""
        for parent, _, _ in os.walk(self.folder):
            with contextlib.suppress(FileNotFoundError):
                os.chmod(parent, 0o700)

    def close(self) -> None:
        """End Ray and all its processes, and remove its folder."""
        self._closing.set()
        if self._folder is None:
            return
        assert self._owner.stdin is not None
        self._owner.stdin.close()
        try:
            self._owner.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._owner.kill()
            self._owner.wait()
        if self._owner.returncode < 0:
            self._kill_group()
        if self._follower is not threading.current_thread():
            self._follower.join(_CLOSE_TIMEOUT_S)  # `on_lost` is not called after this
        self._folder.remove()
        self._folder = None

    def _follow(self) -> None:
        """Read what the owner says until it ends."""
        assert self._owner.stdout is not None
        lines: Iterator[dict[str, str]] = map(json.loads, self._owner.stdout)
        first = next(lines, None)
        self._first.put(first or {"error": self._last_words()})
        if not first or "address" not in first:
            return
        last = next(lines, None)
        if self._closing.is_set():
            return
        if last is None:
            self._kill_group()
        self._on_lost(last["lost"] if last else "the process that owns Ray has ended")

    def _kill_group(self) -> None:
        """Kill what an owner that was killed has left: Ray's agents would wait a minute for the rest of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._owner.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        """Return the last line that an owner without an answer has written."""
        try:
            text = self._folder.path.joinpath(RAY_LOG).read_text(errors="replace") if self._folder else ""
        except OSError:
            text = ""
        return (text.split("\n")[-2:] or [""])[0] or "its process ended without a word"


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Have `values` in the environment of this process for a moment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def driver_settings(values: Mapping[str, str], is_local: bool) -> Iterator[None]:
    """Have Ray in this process read `values` as if they were in its environment, which is left as it was.

    Args:
        is_local: an address on loopback is taken as it is, where Ray would put that of a network interface.
    """
    from ray._private import ray_constants

    may_span_nodes = ray_constants.ENABLE_RAY_CLUSTER
    with environment(values):
        read_environment()
        ray_constants.ENABLE_RAY_CLUSTER = may_span_nodes and not is_local
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = may_span_nodes


def read_environment() -> None:
    """Have Ray in this process, which read its environment when it was imported, read it again."""
    from ray import _raylet

    native: Any = _raylet  # has no type stubs

    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()
