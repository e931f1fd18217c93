"""What is stored in the folder of a node, fast for many blocks: the header of a block is read once in a process."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from workers.kv.block_file import BlockShape, read_info
from workers.kv.open_file import BadBlock

_KEY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_STALE_S = 3600.0  # nobody writes to a temporary file of this age


class Entry(NamedTuple):
    """One stored block."""

    key: bytes
    parent: bytes
    start: int
    num_bytes: int  # of all its files
    used: float  # seconds since 1970


class BlockListing:
    """Lists the blocks of a store; what writers that have ended left behind is removed.

    Parent and start are part of what a key stands for, so they are remembered from one listing to the next.
    """

    def __init__(self, root: Path, shape: BlockShape) -> None:
        self._root = root
        self._shape = shape
        self._places: dict[bytes, tuple[bytes, int]] = {}

    def entries(self) -> Iterator[Entry]:
        """Yield all blocks."""
        places: dict[bytes, tuple[bytes, int]] = {}
        for prefix in (self._root / name for name in names(self._root) if len(name) == 2):
            keys = [name for name in names(prefix) if _KEY.fullmatch(name)]
            for name in keys:
                key = bytes.fromhex(name)
                found = _files(f"{prefix}/{name}")
                if found is None:
                    continue
                used, sizes = found
                place = self._places.get(key) or self._place(sizes, key)
                if place is not None:
                    places[key] = place
                yield Entry(key, *(place or (b"", 0)), sum(sizes.values()), used)
            if not keys:
                remove_if_empty(prefix)
        self._places = places

    def _place(self, paths: Iterable[str], key: bytes) -> tuple[bytes, int] | None:
        """Return parent and start of a block from the first good one of its files; None when there is none."""
        for path in paths:
            with contextlib.suppress(BadBlock, OSError):
                info = read_info(Path(path), self._shape)
                if info.key == key:
                    return info.parent, info.start
        return None


def names(folder: Path) -> list[str]:
    """Return the names in a folder; none when it is no folder, or a link to one."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return []
        return sorted(os.listdir(folder))
    except OSError:
        return []


def remove_if_empty(folder: Path | str) -> None:
    """Remove a folder unless something is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _files(folder: str) -> tuple[float, dict[str, int]] | None:
    """Return the time of last use of a block and the bytes of its files by path; None when it has no files."""
    sizes: dict[str, int] = {}
    try:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode):
            return None
        with os.scandir(folder) as items:
            for item in items:
                if _TEMPORARY.fullmatch(item.name):
                    _remove_if_stale(item)
                    continue
                with contextlib.suppress(OSError):
                    sizes[item.path] = item.stat(follow_symlinks=False).st_size
    except OSError:
        return None
    if not sizes and time.time() - status.st_mtime > _STALE_S:
        remove_if_empty(folder)
    return (status.st_mtime, sizes) if sizes else None


def _remove_if_stale(item: os.DirEntry[str]) -> None:
    with contextlib.suppress(OSError):
        if time.time() - item.stat(follow_symlinks=False).st_mtime > _STALE_S:
            os.unlink(item.path)
