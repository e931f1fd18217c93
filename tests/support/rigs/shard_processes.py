"""Which process of a head is which shard: read from the Unix sockets that they listen on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

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
            paths = [Path(str(connection.laddr)) for connection in process.net_connections("unix")]
        except psutil.Error:
            continue
        for path in paths:
            if match := _SOCKET.fullmatch(path.name):
                stage, rank, epoch = map(int, match.groups())
                found[stage, rank] = ShardProcess(process, epoch, path.parent)
    return found
