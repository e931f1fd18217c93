"""A Ray of several machines on this one, started as docs/deploy.md says."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import psutil

from cluster.bench.head_process import marked_processes, marking
from tests.support.nodes.network import Network
from tests.support.paths import ROOT
from tests.support.rigs.head import LONG, until

SCRIPT = ROOT / "configs" / "deploy" / "ray-node.sh"
RAY_PORT = 6379
_STARTED = "Ray runtime started"
_ATTEMPTS = 4
_GONE_WITHIN_S = 30.0


class RayNodes:
    """A Ray of several machines, each started by configs/deploy/ray-node.sh; the first one is Ray's head."""

    def __init__(self, machines: int) -> None:
        self.network = Network(machines)
        self.mark = uuid.uuid4().hex  # in the environment of everything that Ray starts
        self.folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))  # short: sockets are in it
        self.token = self.folder / "token"
        self._shells: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where others join."""
        return f"{self.network.addresses[0]}:{RAY_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """What a head needs to join."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def session(self, index: int) -> Path:
        """Return the folder of Ray's sockets and logs of a machine."""
        return self.folder / f"ray{index}"

    def start(self, index: int, cpus: int) -> None:
        """Start Ray on a machine, and wait until it has; the first one before the others.

        Ray gives up after 30 s, which is too soon for a machine with much else to do: then it is tried again.
        """
        for attempt in range(_ATTEMPTS):
            said = self._try_to_start(index, cpus)
            if not said:
                return
            self.lose(index)
            assert attempt < _ATTEMPTS - 1, f"Ray ended: {said}"

    def _try_to_start(self, index: int, cpus: int) -> str:
        """Start Ray on a machine; returns "" once it has, or what it said when it ended."""
        own = self.network.addresses[index]
        arguments = ["head", own] if index == 0 else ["join", self.address, own]
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = others | marking(self.mark) | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_TOKEN_PATH": str(self.token), "RAY_FOLDER": str(self.session(index)),
        }  # fmt: skip
        log = self.folder / f"ray{index}.log"
        log.unlink(missing_ok=True)
        command = [*self.network.inside(index), str(SCRIPT), *arguments, f"--num-cpus={cpus}"]
        with log.open("wb") as out:
            shell = self._shells[index] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

        def said() -> str:
            return log.read_text(errors="replace")

        until(lambda: shell.poll() is not None or _STARTED in said(), f"Ray on {own}", 2 * LONG)
        return "" if _STARTED in said() else said()[-2000:] or "without a word"

    def lose(self, index: int) -> None:
        """Kill everything on a machine."""
        self.network.kill(index)
        if index in self._shells:
            self._shells.pop(index).wait(LONG)

    def stages(self) -> list[psutil.Process]:
        """Return the stage processes of all machines."""
        found = []
        for process in marked_processes(self.mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "StageActor" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def machine_of(self, process: psutil.Process) -> int:
        """Return on which machine a process is."""
        here = os.stat(f"/proc/{process.pid}/ns/net").st_ino
        for index in range(len(self.network.addresses)):
            if any(os.stat(f"/proc/{each.pid}/ns/net").st_ino == here for each in self.network.processes(index)[:1]):
                return index
        raise AssertionError(f"process {process.pid} is on no machine")

    def close(self) -> None:
        """End everything; raises nothing."""
        self.network.close()
        for shell in self._shells.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.kill()
                shell.wait(_GONE_WITHIN_S)
        for process in marked_processes(self.mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
