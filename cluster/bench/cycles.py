"""Start a head, submit a job, stop the head, many times over; then count what was left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.tools.assets import needle_dir


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What exists on this machine at one moment, by name."""

    temporary: frozenset[str]  # paths under TMPDIR
    shared_memory: frozenset[str]  # paths under /dev/shm
    processes: frozenset[str]  # of this user: pid and name
    descriptors: int  # of this user's processes together

    @classmethod
    def now(cls) -> Leftovers:
        """Look at what exists, but for zombies and kernel threads."""
        processes, descriptors = set(), 0
        for process in psutil.process_iter():
            try:
                if process.uids().real == os.getuid() and process.cmdline():
                    descriptors += process.num_fds()
                    processes.add(f"{process.pid} {process.name()}")
            except psutil.Error:  # it ended meanwhile
                continue
        return cls(_paths(tempfile.gettempdir()), _paths("/dev/shm"), frozenset(processes), descriptors)

    def more_than(self, before: Leftovers) -> dict[str, Any]:
        """Return the names that are new, and how many descriptors more there are."""
        return {
            "temporary": sorted(self.temporary - before.temporary),
            "shared_memory": sorted(self.shared_memory - before.shared_memory),
            "processes": sorted(self.processes - before.processes),
            "descriptors": self.descriptors - before.descriptors,
        }


def _paths(folder: str) -> frozenset[str]:
    return frozenset(str(path) for path in Path(folder).rglob("*")) if Path(folder).is_dir() else frozenset()


def measure_cycles(count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run `up`, `submit --wait` and `down` of the demo model `count` times; return what is there that was not before.

    The first cycle comes before the counting: it may compile kernels.
    """
    with tempfile.TemporaryDirectory(prefix="lr-cycles-") as root:
        folder = Path(root)
        config = folder / "head.yaml"
        config.write_text(json.dumps(_settings(folder)))
        (folder / "document.txt").write_text("The code of old stone is 12345. " * 40)
        _cycle(config)
        before, seconds = Leftovers.now(), []
        for number in range(1, count + 1):
            seconds.append(_cycle(config))
            say(f"cycle {number} of {count}: {seconds[-1]:.1f} s")
        after = Leftovers.now()
    return {"cycles": count, "cycle_s": [round(s, 2) for s in seconds], "left": after.more_than(before)}


def _settings(folder: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "model": {"path": str(needle_dir())},
        "cluster": {"threads_per_actor": 1, "cpus_per_actor": 0.5},
        "kv_cache": {"bytes": "64MiB"},
        "server": {"port": port},
        "data_dir": str(folder / "data"),
    }


def _cycle(config: Path) -> float:
    """Start, ask, stop; return the seconds. Raises RuntimeError when a command fails."""
    began = time.monotonic()
    data_dir, document = config.parent / "data", config.parent / "document.txt"
    question = ("submit", "--document", str(document), "--question", "What is the code?", "--max-tokens", "8", "--wait")
    for arguments in (("up", str(config)), (*question, "--data-dir", str(data_dir)), ("down", str(config))):
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"longreach {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return time.monotonic() - began
