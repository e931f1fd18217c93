"""Which process of a head is which shard: read from the Unix sockets that they listen on."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

_LISTEN = "0A"  # state of a TCP socket in /proc
_SOCKET = re.compile(r"s(\d+)r(\d+)e(\d+)\.sock")


class ShardProcess(NamedTuple):
    process: psutil.Process
    epoch: int  # that it was started in
    folder: Path  # of its sockets


def shard_processes(actors: Iterable[psutil.Process]) -> dict[tuple[int, int], ShardProcess]:
    """Return the stage processes that listen, by stage and rank."""
    found = {}
    for process in actors:
        try:
            paths = _unix_sockets(process)
        except (psutil.Error, OSError):
            continue
        for path in paths:
            if match := _SOCKET.fullmatch(path.name):
                stage, rank, epoch = map(int, match.groups())
                found[stage, rank] = ShardProcess(process, epoch, path.parent)
    return found


def tcp_ports(process: psutil.Process) -> list[int]:
    """Return the ports that a process listens on, in its own network namespace (Linux)."""
    inodes, ports = _sockets(process), []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                ports.append(int(fields[1].rpartition(":")[2], 16))
    return ports


def _unix_sockets(process: psutil.Process) -> list[Path]:
    """Return the paths of the Unix sockets of a process; on Linux also in another network namespace than this one."""
    if sys.platform != "linux":
        return [Path(str(connection.laddr)) for connection in process.net_connections("unix")]
    inodes = _sockets(process)
    lines = Path(f"/proc/{process.pid}/net/unix").read_text().splitlines()[1:]
    fields = [line.split(maxsplit=7) for line in lines]
    return [Path(each[7]) for each in fields if len(each) == 8 and each[6] in inodes]


def _sockets(process: psutil.Process) -> set[str]:
    """Return the inodes of the sockets of a process."""
    found = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                found.add(target[len("socket:[") : -1])
    return found
