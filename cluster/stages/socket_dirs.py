"""Run directories: a folder `longreach-...` under TMPDIR with the sockets of one pipeline, removed when it stops.

A head process that was killed leaves its folder behind; the next start removes it. A folder is unused if the process
that owns it is gone, or, where no owner is named, if it is some minutes old and nobody listens on its sockets. Folders
of other users are never touched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

import psutil

PREFIX = "longreach-"
OWNER_FILE = "owner.json"
_MIN_AGE_S = 120.0  # the sockets of a younger folder without an owner may be about to open
_CLOCK_SLACK_S = 1.0

_log = logging.getLogger(__name__)


def make_run_dir() -> Path:
    """Return a new folder that names this process as its owner."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    process = psutil.Process()
    (folder / OWNER_FILE).write_text(json.dumps({"pid": process.pid, "started": process.create_time()}))
    return folder


def clean_run_dirs(parent: Path | None = None) -> list[Path]:
    """Remove this user's unused folders under `parent` (default: TMPDIR); returns those that were removed."""
    removed = []
    try:
        folders = sorted((parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"))
    except OSError:
        return []
    for folder in folders:
        with contextlib.suppress(OSError):  # another start may remove it at the same time
            if _is_ours(folder) and _is_unused(folder):
                shutil.rmtree(folder)
                removed.append(folder)
    if removed:
        _log.info("removed %d folders that killed heads had left in %s", len(removed), removed[0].parent)
    return removed


def _is_ours(folder: Path) -> bool:
    """Return whether it is a folder of this user, not a link to one, that nobody else can write to."""
    status = folder.lstat()  # not what a link points to
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _is_unused(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    if not all(name == OWNER_FILE or name.endswith((".sock", ".store")) for name in names):
        return False  # something else of this user with such a name
    if OWNER_FILE in names:
        return not _is_owner_alive(folder / OWNER_FILE)
    if time.time() - folder.lstat().st_mtime < _MIN_AGE_S:
        return False
    return not any(map(_is_listening, folder.glob("s*.sock")))  # of the gRPC servers; links take one connection only


def _is_owner_alive(path: Path) -> bool:
    try:
        owner = json.loads(path.read_text())
        process = psutil.Process(int(owner["pid"]))
        is_same = abs(process.create_time() - float(owner["started"])) < _CLOCK_SLACK_S  # pids are used again
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, ValueError, KeyError, TypeError):
        return True  # in doubt, it is kept


def _is_listening(path: Path) -> bool:
    """Return whether a process listens on a socket file."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
