"""Locks on folders: who owns a data directory or a run directory is read from them, not from times or process ids.

A lock belongs to an open descriptor. The kernel frees it when the process that opened it ends, however it ends; a
zombie holds none. No other program inherits one unless it is handed over by name, since descriptors are close-on-exec.

Needs the standard library only.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock_folder(folder: Path, shared: bool = False) -> int | None:
    """Lock a folder; returns the descriptor that holds the lock until it is closed, None while another excludes it.

    Args:
        shared: any number of processes may hold it, while nobody holds it alone.

    Raises:
        FileNotFoundError: there is no such folder, or it was replaced meanwhile. OSError: its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(f"{folder} was replaced")
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder alone. Raises OSError: its file system has no locks."""
    try:
        descriptor = lock_folder(folder, shared=True)
    except FileNotFoundError:
        return False
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def hold_folder(folder: Path) -> int:
    """Make a folder (mode 0700) unless it is there, and share its lock; returns the descriptor.

    Whoever removes unused folders holds their lock alone, so that one which is held is never removed.

    Raises:
        OSError: it cannot be made, or its file system has no locks.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = lock_folder(folder, shared=True)
        except FileNotFoundError:  # it is being removed
            continue
        if descriptor is not None:
            return descriptor
