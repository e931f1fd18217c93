"""What the machine is, and how much of it other programs use while something is measured."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from cluster.common.addresses import is_loopback
from protos.node.environment import cpu_facts, usable_cores

_PREFIXES = ("amx", "avx", "fma", "sve", "neon")  # of the instruction sets that are listed
_IDLE = ("idle", "iowait", "guest", "guest_nice")  # guests are counted as user time already


def describe_machine() -> dict[str, Any]:
    """Return processor, instruction sets, cores, memory and load average of this machine as plain data."""
    facts = cpu_facts() or {}
    flags = facts.get("flags", facts.get("Features", "")).split()
    memory = psutil.virtual_memory()
    return {
        "processor": facts.get("model name", "unknown"),
        "instruction_sets": sorted(flag for flag in flags if flag.startswith(_PREFIXES)),
        "has_amx": "amx_bf16" in flags,
        "cores": usable_cores(),
        "cores_of_machine": psutil.cpu_count() or usable_cores(),
        "memory_bytes": int(memory.total),
        "available_bytes": int(memory.available),
        "load_average": [round(value, 2) for value in psutil.getloadavg()],
        "cpu_mhz": round(frequency.current) if (frequency := psutil.cpu_freq()) else None,
    }


class Mark(NamedTuple):
    """Seconds since some moment: of the clock, of all cores together while busy, and of our own processes."""

    at: float
    busy: float
    own: float


@dataclass(frozen=True, slots=True)
class LoadOfOthers:
    """Tells what other programs have used of the cores between two moments.

    Our own share is that of this process and all that it has started, also of those that have ended. Time that a
    hypervisor gives to other guests counts as used by others.

    Attributes:
        cores: of the whole machine, which others share.
        more: ids of further processes that count as our own, such as a server that is measured.
    """

    cores: int
    more: tuple[int, ...] = ()
    clock: Callable[[], float] = time.monotonic
    busy_s: Callable[[], float] = lambda: busy_seconds(psutil.cpu_times()._asdict())
    own_s: Callable[[Iterable[int]], float] = lambda more: own_seconds(more)

    def mark(self) -> Mark:
        """Return where the clocks stand."""
        return Mark(self.clock(), self.busy_s(), self.own_s(self.more))

    def since(self, mark: Mark) -> float:
        """Return the share of all cores that others have used since `mark`, 0 to 1."""
        now = self.mark()
        others = (now.busy - mark.busy) - (now.own - mark.own)
        return min(1.0, max(0.0, others / max(1e-9, (now.at - mark.at) * self.cores)))


def busy_seconds(times: dict[str, float]) -> float:
    """Return the seconds in which a core did something, of the fields of `psutil.cpu_times()`."""
    return sum(value for name, value in times.items() if name not in _IDLE)


def own_seconds(more: Iterable[int] = ()) -> float:
    """Return the processor seconds of this process, of the processes `more`, and of all that they have started."""
    roots = [psutil.Process()]
    for pid in more:
        with contextlib.suppress(psutil.Error):
            roots.append(psutil.Process(pid))
    tree: dict[int, psutil.Process] = {}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            tree |= {process.pid: process for process in (root, *root.children(recursive=True))}
    total = 0.0
    for process in tree.values():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system  # those that have ended
    return total


def server_pids(url: str) -> tuple[int, ...]:
    """Return the processes of this machine that listen at the port of a URL; none for another machine's."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not parts.hostname or not (parts.hostname == "localhost" or is_loopback(parts.hostname)):
        return ()
    found = set()
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("inet"):
            is_listener = connection.status == psutil.CONN_LISTEN and connection.type == socket.SOCK_STREAM
            if is_listener and connection.laddr and connection.laddr.port == port and connection.pid:
                found.add(connection.pid)
    return tuple(sorted(found))
