"""Allocate KV pages and find them by their content. Pure Python: the pages themselves live in the workers.

A page (`kv_cache.page_size` tokens) is free (no content), owned (one or more requests read it) or cached (nobody reads
it, but others can find its content by its hash). Cached pages are evicted oldest first.
"""

from __future__ import annotations

import bisect
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_FREE, _OWNED, _CACHED = 0, 1, 2
_FREE_RUN = re.compile(rb"\0+")  # neighbouring pages that are _FREE


class PagePool:
    """Owns every page: allocates, counts readers, finds by hash."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: {num_pages}: must be at least 1")
        self.num_pages = num_pages
        self._state = bytearray(num_pages)
        self._readers = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.num_releases = 0  # rises when pages may have become available

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free and cached ones."""
        return self._state.count(_FREE) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages that requests own, 0..1."""
        return 1.0 - self.num_available / self.num_pages

    def allocate(self, count: int, adopted: Sequence[int] = ()) -> tuple[int, ...] | None:
        """Return the pages of one more reader: `adopted` (found by `match`) and `count` new ones.

        New pages lie in as few contiguous runs as possible. Returns None (and changes nothing) without room.
        """
        if count > self.num_available - sum(self._readers[page] == 0 for page in adopted):
            return None
        self.adopt(adopted)
        for _ in range(count - self._state.count(_FREE)):
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
            self._state[page] = _FREE
        pages = list(adopted)
        runs = sorted((run.end() - run.start(), run.start()) for run in _FREE_RUN.finditer(self._state))
        missing = count
        while missing:
            best = bisect.bisect_left(runs, (missing, 0))  # the smallest run that holds the rest, or the largest
            size, start = runs.pop(min(best, len(runs) - 1))
            size = min(size, missing)
            self._state[start : start + size] = bytes([_OWNED]) * size
            self._readers[start : start + size] = [1] * size
            pages.extend(range(start, start + size))
            missing -= size
        return tuple(pages)

    def match(self, hashes: Iterable[bytes]) -> tuple[int, ...]:
        """Return the pages of the longest known prefix of `hashes`."""
        pages = []
        for key in hashes:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def has(self, key: bytes) -> bool:
        """Return whether a page with this hash is owned or cached."""
        return key in self._page_of

    def adopt(self, pages: Iterable[int]) -> None:
        """Add a reader to pages found by `match`."""
        for page in pages:
            if self._readers[page] == 0:
                del self._cached[page]
                self._state[page] = _OWNED
            self._readers[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Make the content of an owned page findable. Of several pages with one hash, the first stays the one found."""
        assert self._readers[page] > 0, "only an owned page can be published"
        if key not in self._page_of and page not in self._hash_of:
            self._page_of[key] = page
            self._hash_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Take one reader from each page; unread pages become cached or free. Later pages are evicted first."""
        self.num_releases += 1
        for page in reversed(pages):
            self._readers[page] -= 1
            assert self._readers[page] >= 0, f"page {page} released too often"
            if self._readers[page]:
                continue
            if page in self._hash_of:
                self._state[page] = _CACHED
                self._cached[page] = None
            else:
                self._state[page] = _FREE
