"""Machines on this one: network namespaces with addresses of their own.

All of them see the same files, as machines with a shared folder do. Every wait has an end, and `close` leaves no
process, namespace or interface behind, whatever state they are in.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
import uuid

import psutil

_GONE_WITHIN_S = 30.0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@functools.cache
def why_no_namespaces() -> str:
    """Return why this process cannot make network namespaces; "" if it can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and the program ip (package iproute2)"
    try:
        network = Network(1)
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        return f"network namespaces are not permitted here: {said[-1] if said else error}"
    network.close()
    return ""


class Network:
    """Namespaces on one bridge, which this process reaches too."""

    def __init__(self, count: int) -> None:
        """Raises: subprocess.SubprocessError where that is not permitted; nothing is left then."""
        name = f"lr{uuid.uuid4().hex[:6]}"
        self._bridge = f"{name}b"
        self._names = [f"{name}n{index}" for index in range(count)]
        part = _free_subnet()
        self.addresses = [f"198.18.{part}.{index + 1}" for index in range(count)]
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"198.18.{part}.254/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for index, (namespace, address) in enumerate(zip(self._names, self.addresses, strict=True)):
                _ip("netns", "add", namespace)
                outer = f"{name}v{index}"
                _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
                _ip("link", "set", outer, "master", self._bridge, "up")
                _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
                for link in ("eth0", "lo"):
                    _ip("-n", namespace, "link", "set", link, "up")
                _ip("-n", namespace, "route", "add", "default", "via", f"198.18.{part}.254")
        except BaseException:
            self.close()
            raise

    def inside(self, index: int) -> list[str]:
        """Return the beginning of a command that runs on a machine."""
        return ["ip", "netns", "exec", self._names[index]]

    def processes(self, index: int) -> list[psutil.Process]:
        """Return all processes of a machine."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._names[index]], capture_output=True, text=True, timeout=30, check=False
        )
        processes = []
        for pid in found.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(pid)))
        return processes

    def kill(self, index: int) -> None:
        """SIGKILL every process of a machine, until none is left."""
        end = time.monotonic() + _GONE_WITHIN_S
        while processes := self.processes(index):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, 0.2)
            assert time.monotonic() < end, [process.pid for process in processes]

    def close(self) -> None:
        """Kill what is left on every machine, and remove them."""
        for index, namespace in enumerate(self._names):
            with contextlib.suppress(AssertionError, subprocess.SubprocessError):
                self.kill(index)
            with contextlib.suppress(subprocess.SubprocessError):
                _ip("netns", "del", namespace)  # with its end of the cable, and so the other end
        with contextlib.suppress(subprocess.SubprocessError):
            _ip("link", "del", self._bridge)


def _free_subnet() -> int:
    """Return the third number of a subnet of 198.18.0.0/16 (for tests of networks) that no interface is in."""
    used = {
        int(each.address.split(".")[2])
        for addresses in psutil.net_if_addrs().values() for each in addresses if each.address.startswith("198.18.")
    }  # fmt: skip
    return next(part for part in range(os.getpid() % 200, 255) if part not in used)
