"""Which blocks the stores of all nodes have, and which of them go first. In memory: the files are the truth."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protos.stage import stage_pb2 as pb

_NEW_S = 3600.0  # another head may have written the one before such a block while a listing was read
_LOW_WATER = 0.95  # of the quota: eviction goes on to here, so that not every write evicts


@dataclass(slots=True)
class Entry:
    """One stored block."""

    parent: bytes
    start: int
    used: float  # last use, in seconds since 1970
    saved: float  # last use as the files say
    bytes: dict[str, int] = field(default_factory=dict)  # by node
    is_whole: bool = True  # as far as is known, all shards can load it
    written: float = 0.0  # when all shards had written it, in seconds since 1970; 0: not known
    is_unplaced: bool = False  # all shards have written it since the last listing, and on which nodes is not known yet

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


class KvIndex:
    """Blocks by key. Any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Args: `clock` gives seconds since 1970."""
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[bytes, Entry] = {}
        self._node_bytes: Counter[str] = Counter()
        self._nodes: set[str] = set()
        self._protected: dict[bytes, float] = {}  # until when, in seconds since 1970; not all are stored
        self._changed: dict[bytes, Entry | None] | None = None  # since a listing began; an entry of None: removed

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def node_bytes(self) -> dict[str, int]:
        """Bytes of the store of each node."""
        with self._lock:
            return {node: self._node_bytes[node] for node in self._nodes}

    def begin_listing(self) -> None:
        """Remember what is added and removed from now on: a listing that is read meanwhile may have it or not."""
        with self._lock:
            self._changed = {}

    def replace(self, listed: Mapping[str, Iterable[pb.KvEntry]]) -> None:
        """Take what every node has listed since `begin_listing` as all there is; what is known of its use stays."""
        entries: dict[bytes, Entry] = {}
        for node, items in listed.items():
            for item in items:
                entry = entries.setdefault(item.key, Entry(item.parent, item.start, item.used, item.used))
                entry.used, entry.saved = max(entry.used, item.used), min(entry.saved, item.used)
                entry.bytes[node] = entry.bytes.get(node, 0) + item.bytes
        with self._lock:
            for key, changed in (self._changed or {}).items():
                if changed is None:
                    entries.pop(key, None)
                else:
                    changed.bytes = entries[key].bytes | changed.bytes if key in entries else changed.bytes
                    entries[key] = changed
            for key, entry in entries.items():
                if (before := self._entries.get(key)) is not None:
                    entry.used, entry.is_whole = max(entry.used, before.used), before.is_whole
                    entry.written = before.written
            self._entries, self._nodes, self._changed = entries, set(listed), None
            self._node_bytes = Counter()
            for entry in entries.values():
                self._node_bytes.update(entry.bytes)

    def add(self, key: bytes, parent: bytes, start: int, sizes: Mapping[str, int], now: float) -> None:
        """Note that a block was stored; `sizes` are the bytes that were written on each node, as far as known."""
        with self._lock:
            entry = self._entries.setdefault(key, Entry(parent, start, now, now))
            entry.used = entry.saved = entry.written = now
            entry.is_whole, entry.is_unplaced = True, not sizes
            for node, size in sizes.items():
                entry.bytes[node] = entry.bytes.get(node, 0) + size
                self._node_bytes[node] += size
                self._nodes.add(node)
            if self._changed is not None:
                self._changed[key] = entry

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget blocks that were dropped."""
        with self._lock:
            for key in keys:
                if self._changed is not None:
                    self._changed[key] = None
                if (entry := self._entries.pop(key, None)) is not None:
                    self._node_bytes.subtract(entry.bytes)

    def touch(self, keys: Iterable[bytes], now: float, is_saved: bool = False) -> None:
        """Note that blocks are used. Waits for nobody: the engine calls it, and sorting a large index takes long.

        Args:
            is_saved: the files say so too.
        """
        entries = self._entries
        for key in keys:
            if (entry := entries.get(key)) is not None:
                entry.used = max(entry.used, now)
                entry.saved = entry.used if is_saved else entry.saved

    def protect(self, until: Mapping[bytes, float]) -> None:
        """Let blocks, stored or about to be, be dropped after all others until a moment; waits for nobody."""
        for key, moment in until.items():
            self._protected[key] = max(moment, self._protected.get(key, 0.0))

    def take_unsaved(self, age_s: float) -> list[bytes]:
        """Return the blocks that were used more than `age_s` after what their files say, once each until a listing."""
        with self._lock:
            late = {key: entry for key, entry in self._entries.items() if entry.used - entry.saved > age_s}
            for entry in late.values():
                entry.saved = entry.used
            return list(late)

    def doubt(self, key: bytes, since: float) -> None:
        """Note that a block could not be loaded by every shard: it is stored again when it is computed again.

        Args:
            since: when they began to look; what was written after that may be whole.
        """
        with self._lock:
            if (entry := self._entries.get(key)) is not None and entry.written < since:
                entry.is_whole = False

    def has(self, key: bytes) -> bool:
        """Return whether a block need not be stored."""
        entry = self._entries.get(key)
        return entry is not None and self._is_usable(entry)

    def size(self, key: bytes) -> int:
        """Return the bytes of a block on all nodes, 0 if it is not known."""
        entry = self._entries.get(key)
        return entry.total_bytes if entry is not None else 0

    def prefix(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """Return the blocks of the longest chain from a first block that these keys make, and the bytes of them all.

        The keys may be in any order, and of several prompts.
        """
        with self._lock:
            known = [(key, entry) for key in keys if (entry := self._entries.get(key)) is not None]
            lengths: dict[bytes, int] = {}
            for key, entry in sorted(known, key=lambda item: item[1].start):
                before = lengths.get(entry.parent, 0)
                if self._is_usable(entry) and (before or not entry.start):
                    lengths[key] = before + 1
            return max(lengths.values(), default=0), sum(entry.total_bytes for _, entry in known)

    def chained(self, keys: Iterable[bytes]) -> list[tuple[bytes, bytes, int]]:
        """Return (key, parent, start) of those of these blocks that a chain leads to, parents before their children."""
        with self._lock:
            known = [(key, entry) for key in keys if (entry := self._entries.get(key)) is not None]
            found: dict[bytes, tuple[bytes, bytes, int]] = {}
            for key, entry in sorted(known, key=lambda item: (item[1].start, item[0])):
                if self._is_usable(entry) and (not entry.start or entry.parent in found):
                    found[key] = (key, entry.parent if entry.start else b"", entry.start)
            return list(found.values())

    def _is_usable(self, entry: Entry) -> bool:
        return entry.is_whole and (entry.is_unplaced or entry.bytes.keys() >= self._nodes)

    def expired(self, before: float, retained: Callable[[], Set[bytes]]) -> list[bytes]:
        """Return the blocks that were last used before a moment, but for those that are retained or protected."""
        with self._lock:
            self._spread_use()
            protected = self._still_protected()
            old = [key for key, entry in self._entries.items() if entry.used < before and key not in protected]
        kept = retained() if old else frozenset()
        return [key for key in old if key not in kept]

    def victims(self, limits: Mapping[str, int], retained: Callable[[], Set[bytes]]) -> list[bytes]:
        """Return the blocks to drop so that no node has more bytes than its limit; none while all are below.

        Those go first that were not used for longest, of one chain the later ones, and after all others those that are
        protected; what is retained stays.
        """
        if not self._over(limits):
            return []
        kept = retained()
        with self._lock:
            over = self._over(limits)
            excess = {node: self._node_bytes[node] - int(_LOW_WATER * limits[node]) for node in over}
            self._spread_use()
            chosen, protected = [], self._still_protected()

            def rank(item: tuple[bytes, Entry]) -> tuple[bool, float, int]:
                return item[0] in protected, item[1].used, -item[1].start

            for key, entry in sorted(self._entries.items(), key=rank):
                if not any(left > 0 for left in excess.values()):
                    break
                if key in kept or not any(excess.get(node, 0) > 0 for node in entry.bytes):
                    continue
                chosen.append(key)
                for node, size in entry.bytes.items():
                    if node in excess:
                        excess[node] -= size
            return chosen

    def _over(self, limits: Mapping[str, int]) -> set[str]:
        """Return the nodes that have more bytes than their limit."""
        return {node for node, limit in limits.items() if self._node_bytes[node] > limit}

    def _still_protected(self) -> Set[bytes]:
        """Return the blocks that are protected now, and forget the others (lock held)."""
        now = self._clock()
        for key, until in list(self._protected.items()):  # the engine adds to it meanwhile
            if until <= now:
                self._protected.pop(key, None)
        return self._protected.keys()

    def _spread_use(self) -> None:
        """Let every block be used when those after it were; an old one whose predecessor is gone was never used."""
        new = self._clock() - _NEW_S
        by_start = sorted(self._entries.values(), key=lambda entry: entry.start)
        for entry in reversed(by_start):
            if (parent := self._entries.get(entry.parent)) is not None:
                parent.used = max(parent.used, entry.used)
        for entry in by_start:
            if entry.start and entry.used < new:
                parent = self._entries.get(entry.parent)
                entry.used = 0.0 if parent is None or (parent.start and not parent.used) else entry.used
