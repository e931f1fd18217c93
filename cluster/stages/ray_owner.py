"""The process that owns a local Ray: it starts Ray's daemons, watches them, and leaves none of them behind.

`LocalRay` runs this file as a script in a session of its own. The head starts no daemon itself, since that takes a
fork, which may hang beside running threads; and a head that is killed could end nothing. This process outlives it by
the moment it takes to kill whatever descends from it (on Linux, orphans too) and to remove the folder.

It prints one JSON object a line: `address` once Ray runs, or `error`; later `lost`, the reason, when a daemon without
which nothing works has ended. It ends after either, and when its standard input or its parent does. Imports nothing of
ours, so that it needs no module path.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

_POLL_S = 0.1
_KILL_TIMEOUT_S = 10.0
_SET_CHILD_SUBREAPER = 36  # prctl(2)


def main(folder: Path, lock: int, num_cpus: int, object_store_bytes: int) -> None:
    """Start Ray with its files in `folder`, and stay until it or the parent ends. `lock` holds the folder's lock."""
    parent = os.getppid()
    os.set_inheritable(lock, False)
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # a head has them blocked
    signal.signal(signal.SIGTERM, lambda *_: None)  # the head decides, also when the whole service is told to stop
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        node = _start(folder, num_cpus, object_store_bytes)
        _say(address=node.gcs_address)
        while not (reason := _lost(node)) and os.getppid() == parent:
            if select.select([sys.stdin], [], [], _POLL_S)[0]:
                break
        if reason:
            _say(lost=reason)
    except Exception as error:  # noqa: BLE001 - whatever it is, the head says it
        _say(error=" ".join(str(error).split())[:300] or type(error).__name__)
    finally:
        _kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, num_cpus: int, object_store_bytes: int) -> Any:
    """Start what `ray.init` starts, on loopback only, but for the log monitor and the autoscaler; return Ray's node."""
    from ray._private import parameter
    from ray._private.node import Node

    files = folder / "ray"  # Ray opens its folders to everybody; nobody else can enter the one around them
    make: Any = parameter.RayParams  # its annotations are wrong
    parameters = make(
        node_ip_address="127.0.0.1", num_cpus=num_cpus, object_store_memory=object_store_bytes,
        include_dashboard=False, include_log_monitor=False, no_monitor=True, temp_dir=str(files),
        plasma_store_socket_name=str(files / "plasma"), raylet_socket_name=str(files / "raylet"),
    )  # fmt: skip
    # the kernel kills the daemons if this process is killed
    return Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


def _lost(node: Any) -> str:
    """Return which daemon has ended and how, "" while those that matter run."""
    for kind, process in node.dead_processes():
        if kind in ("gcs_server", "raylet"):
            code = process.returncode
            return f"Ray's {kind} ended ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
    return ""


def _say(**line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(line), flush=True)


def _kill_descendants() -> None:
    """Kill until nobody is left: whose parent was killed becomes a child of this process. Reaps them all."""
    end = time.monotonic() + _KILL_TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        descendants = psutil.Process().children(recursive=True)
        if not descendants:
            return
        for process in descendants:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
