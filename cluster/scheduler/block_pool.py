"""Who owns which KV block. Pure Python; the blocks themselves live in the workers.

A block is free (no content), owned (one or more requests read it) or cached (nobody reads it, but its content is known
by the hash of its page and may be adopted again; evicted oldest first). Storage, index and allocation of the workers
are elsewhere: this is the only place that decides.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

_FREE, _OWNED, _CACHED = 0, 1, 2
_FREE_RUN = re.compile(rb"\0+")  # blocks that are _FREE and lie together


def page_hashes(token_ids: Sequence[int], page_size: int, root: bytes) -> list[bytes]:
    """SHA-256 of every full page, chained: a hash stands for the page and everything before it.

    Args:
        root: what else the content of KV depends on (model fingerprint, positions, dtype).
    """
    return list(iter_page_hashes(array("I", token_ids), page_size, root))


def iter_page_hashes(token_ids: Sequence[int], page_size: int, root: bytes) -> Iterator[bytes]:
    """As `page_hashes`, one after the other: nothing is computed for pages nobody asks for."""
    previous = root
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        page = array("I", token_ids[start : start + page_size])
        previous = hashlib.sha256(previous + page.tobytes()).digest()
        yield previous


class BlockPool:
    """Allocates blocks, counts their readers and finds cached pages by hash."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}: must be at least 1")
        self.num_blocks = num_blocks
        self._state = bytearray(num_blocks)
        self._readers = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._num_free = num_blocks
        self.num_releases = 0  # rises when blocks may have become available

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free ones and cached ones nobody reads."""
        return self._num_free + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of blocks some request owns, 0..1."""
        return 1.0 - self.num_available / self.num_blocks

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks for one reader, in as few contiguous runs as possible; None (nothing changed) without room."""
        if count > self.num_available:
            return None
        while self._num_free < count:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self._state[block] = _FREE
            self._num_free += 1
        taken: list[int] = []
        runs = sorted((run.end() - run.start(), run.start()) for run in _FREE_RUN.finditer(self._state))
        while len(taken) < count:
            missing = count - len(taken)
            best = bisect.bisect_left(runs, (missing, 0))  # the smallest run that holds the rest, or the largest
            size, at = runs.pop(min(best, len(runs) - 1))
            size = min(size, missing)
            self._state[at : at + size] = bytes([_OWNED]) * size
            taken.extend(range(at, at + size))
        for block in taken:
            self._readers[block] = 1
        self._num_free -= count
        return tuple(taken)

    def match(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of the longest known prefix of `hashes`."""
        found = []
        for page in hashes:
            block = self._block_of.get(page)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def knows(self, page: bytes) -> bool:
        return page in self._block_of

    def num_unread(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody reads: adopting them makes as many fewer available."""
        return sum(self._readers[block] == 0 for block in blocks)

    def adopt(self, blocks: Iterable[int]) -> None:
        """Add a reader to blocks found by `match`."""
        for block in blocks:
            if self._readers[block] == 0:
                del self._cached[block]
                self._state[block] = _OWNED
            self._readers[block] += 1

    def publish(self, block: int, page: bytes) -> None:
        """Make the content of an owned block findable. The first block published for a page stays the one."""
        assert self._readers[block] > 0, "only an owned block can be published"
        if page not in self._block_of and block not in self._hash_of:
            self._block_of[page] = block
            self._hash_of[block] = page

    def release(self, blocks: Sequence[int]) -> None:
        """Take one reader from each block; unread blocks become cached or free. Later pages are evicted first."""
        self.num_releases += 1
        for block in reversed(blocks):
            self._readers[block] -= 1
            assert self._readers[block] >= 0, f"block {block} released too often"
            if self._readers[block]:
                continue
            if block in self._hash_of:
                self._state[block] = _CACHED
                self._cached[block] = None
            else:
                self._state[block] = _FREE
                self._num_free += 1

    def clear_cache(self) -> int:
        """Forget all cached pages nobody reads; returns how many."""
        count = len(self._cached)
        for block in self._cached:
            self._forget(block)
            self._state[block] = _FREE
        self._cached.clear()
        self._num_free += count
        return count

    def _forget(self, block: int) -> None:
        del self._block_of[self._hash_of.pop(block)]

    def check_integrity(self, owned: Iterable[Sequence[int]] = ()) -> None:
        """Verify every invariant against the block lists of the requests that hold blocks.

        Raises:
            AssertionError: with the first block that is wrong.
        """
        readers = [0] * self.num_blocks
        for blocks in owned:
            for block in blocks:
                readers[block] += 1
        for block in range(self.num_blocks):
            expected = _OWNED if readers[block] else (_CACHED if block in self._cached else _FREE)
            assert self._readers[block] == readers[block], (
                f"block {block}: {self._readers[block]} readers counted, {readers[block]} requests hold it"
            )
            assert self._state[block] == expected, f"block {block}: state {self._state[block]}, expected {expected}"
            if expected == _FREE:
                assert block not in self._hash_of, f"block {block} is free but has a hash"
        assert self._num_free == self._state.count(_FREE), "free blocks miscounted"
        assert len(self._hash_of) == len(self._block_of), "hash index out of step"
        for page, block in self._block_of.items():
            assert self._hash_of.get(block) == page, f"block {block}: hash index out of step"
