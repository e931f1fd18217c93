"""Run directories: a folder `longreach-...` under TMPDIR with what a pipeline or a local Ray keeps there while it runs.

Every process that uses a folder shares its lock for life: the head, the process that owns Ray, stages. A head that was
killed leaves its folder behind; the next start removes it. A folder that somebody uses is never removed, nor are those
of other users and those with other contents.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.common.errors import PreflightError
from protos.node.locks import hold_folder, lock_folder

PREFIX = "longreach-"
RAY_FOLDER, RAY_LOG = "ray", "ray.err"  # of a local Ray: its temporary files, what its owner says
_MAX_SOCKET_PATH = 103 if os.uname().sysname == "Darwin" else 107  # bytes, of the kernel
_LONGEST_NAME = len("/longreach-12345678/link99r99e9999.sock")  # stage, rank, epoch; longer than those of Ray

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunDir:
    """A folder that this process uses until `remove`. `lock` is the descriptor that holds its lock."""

    path: Path
    lock: int

    def remove(self) -> None:
        """Remove the folder; called once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def make_run_dir() -> RunDir:
    """Return a new folder, open to this user only. Raises PreflightError naming TMPDIR where that is impossible."""
    parent = tempfile.gettempdir()
    longest = _MAX_SOCKET_PATH - _LONGEST_NAME
    if len(os.fsencode(parent)) > longest:
        raise PreflightError(
            f"TMPDIR: {parent}: too long for Unix sockets: must be at most {longest} bytes, such as /tmp"
        )
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        return RunDir(folder, hold_folder(folder))
    except OSError as error:
        reason = f"no folder can be made and locked there ({error.strerror or error})"
        raise PreflightError(f"TMPDIR: {parent}: {reason}: name a folder on a local disk") from error


def clean_run_dirs(parent: Path | None = None) -> list[Path]:
    """Remove this user's unused folders under `parent` (default: TMPDIR); returns those that were removed."""
    try:
        folders = sorted((parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"))
    except OSError:
        return []
    removed = [folder for folder in folders if _remove_unused(folder)]
    if removed:
        _log.info("removed %d folders that killed heads had left in %s", len(removed), removed[0].parent)
    return removed


def _remove_unused(folder: Path) -> bool:
    try:
        lock = lock_folder(folder) if _is_ours(folder) else None
    except OSError:  # gone, or a file system without locks: in doubt, it is kept
        return False
    if lock is None:
        return False
    try:
        shutil.rmtree(folder)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _is_ours(folder: Path) -> bool:
    """Return whether it is a folder of this user, not a link to one, that only holds what a run directory holds."""
    status = folder.lstat()  # not what a link points to
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    names = {entry.name for entry in folder.iterdir()} - {RAY_FOLDER, RAY_LOG}
    return all(name.endswith((".sock", ".store")) for name in names)
