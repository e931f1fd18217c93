"""Run directories: a folder `longreach-...` under TMPDIR with the sockets of one pipeline, removed when it stops.

A head that was killed leaves its folder behind; the next start removes it. A folder is dead when the process that owns
it is gone, or, without the name of an owner, when it has been there for a while and nobody answers on its sockets.
Folders of other users are never touched.
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
_SETTLED_S = 120.0  # a younger folder without an owner may be one whose sockets are about to open
_CLOCK_SLACK_S = 1.0

_log = logging.getLogger(__name__)


def make_run_dir() -> Path:
    """A new folder that names this process as its owner."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    process = psutil.Process()
    (folder / OWNER_FILE).write_text(json.dumps({"pid": process.pid, "started": process.create_time()}))
    return folder


def clean_run_dirs(parent: Path | None = None) -> list[Path]:
    """Remove the folders of dead heads of this user under `parent` (default: TMPDIR); returns what was removed."""
    removed = []
    try:
        found = sorted((parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"))
    except OSError:
        return []
    for folder in found:
        with contextlib.suppress(OSError):  # another start may remove it at the same time
            if _is_ours(folder) and _is_dead(folder):
                shutil.rmtree(folder)
                removed.append(folder)
    if removed:
        _log.info("removed %d folders that killed heads had left in %s", len(removed), removed[0].parent)
    return removed


def _is_ours(folder: Path) -> bool:
    """A real folder of this user that nobody else can write to."""
    status = folder.lstat()  # not what a link points to
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _is_dead(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    if not all(name == OWNER_FILE or name.endswith((".sock", ".store")) for name in names):
        return False  # something else of this user with such a name
    if OWNER_FILE in names:
        return not _owner_lives(folder / OWNER_FILE)
    if time.time() - folder.lstat().st_mtime < _SETTLED_S:
        return False
    return not any(_answers(folder / name) for name in names if name.endswith(".sock"))


def _owner_lives(path: Path) -> bool:
    try:
        owner = json.loads(path.read_text())
        process = psutil.Process(int(owner["pid"]))
        is_same = abs(process.create_time() - float(owner["started"])) < _CLOCK_SLACK_S  # pids are used again
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, ValueError, KeyError, TypeError):
        return True  # when in doubt, it lives


def _answers(path: Path) -> bool:
    """Whether a process listens on a socket file."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
