"""A head in processes of its own, which may be killed: `longreach serve`, and everything that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

from cluster.client.connection import read_state
from cluster.client.errors import Unavailable

_MARK = "LONGREACH_HEAD_MARK"
Role = Literal["head", "stage", "raylet", "gcs"]
ROLES: tuple[Role, ...] = ("head", "stage", "raylet", "gcs")
_TITLES: dict[Role, str] = {"stage": "StageActor", "raylet": "raylet/raylet", "gcs": "gcs/gcs_server"}
_PATIENCE_S = 120.0  # nothing waits as long when all is well
_GONE_WITHIN_S = 10.0


def until(condition: Callable[[], object], what: str, within_s: float = _PATIENCE_S) -> None:
    """Wait for a condition. Raises TimeoutError naming `what`."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"it did not happen within {within_s:g} s: {what}")
        time.sleep(0.02)


def marking(mark: str) -> dict[str, str]:
    """Return what marks a head in its environment, which every process that it starts inherits.

    Ray's agents overwrite the place of their first environment by their titles, unless they are told not to.
    """
    return {_MARK: mark, "SPT_NOENV": "1"}


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the running processes that inherited a mark."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


class HeadProcess:
    """A `longreach serve` over a configuration; started, killed and started again on the same data directory."""

    def __init__(self, config: Path, data_dir: Path, log: Path) -> None:
        """Args: `log` gets what the head prints."""
        self.config = config
        self.data = data_dir
        self.log = log
        self.command = [sys.executable, "-m", "cluster.cli"]  # of the next start, before `serve`
        self.environment: dict[str, str] = {}  # of the next start, beside that of this process
        self.mark = ""  # of the newest head
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a head and wait until it is ready."""
        self.mark = uuid.uuid4().hex
        command = [*self.command, "serve", str(self.config)]
        environment = os.environ | marking(self.mark) | {"OMP_NUM_THREADS": "1"} | self.environment
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        until(self._is_ready, "a ready head")

    def _is_ready(self) -> bool:
        if not self.is_running:
            raise RuntimeError(f"the head ended: {self.log.read_text(errors='replace')[-3000:]}")
        try:
            return int(read_state(self.data)["pid"]) == self.pid
        except Unavailable:
            return False

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start() comes first"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Return what runs of the newest head, itself included."""
        return marked_processes(self.mark)

    def find(self, role: Role) -> list[psutil.Process]:
        """Return the processes of the newest head that have a role."""
        if role == "head":
            return [psutil.Process(self.pid)]
        return [process for process in self.processes() if _TITLES[role] in _command(process)]

    def kill(self) -> None:
        """SIGKILL the head, then wait until nothing of it is left, which takes a moment."""
        self.process.kill()
        self.process.wait(_PATIENCE_S)
        until(lambda: not self.processes(), "no process of the killed head survives", _GONE_WITHIN_S)

    def stop(self) -> int:
        """Stop the head in order; returns its exit code."""
        if self.is_running:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_PATIENCE_S)

    def close(self) -> None:
        """Kill whatever is left of the newest head, until nothing is."""
        end = time.monotonic() + _GONE_WITHIN_S
        while self.mark and (left := self.processes()) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)
        if self._process is not None:
            self._process.wait()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
