"""Who owns which KV page. Pure Python; the pages themselves live in the workers.

A page is free (no content), owned (one or more requests read it) or cached (nobody reads it, but its content is known
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
_FREE_RUN = re.compile(rb"\0+")  # pages that are _FREE and lie together


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
        tokens = array("I", token_ids[start : start + page_size])
        previous = hashlib.sha256(previous + tokens.tobytes()).digest()
        yield previous


class PagePool:
    """Allocates pages, counts their readers and finds cached pages by hash."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: {num_pages}: must be at least 1")
        self.num_pages = num_pages
        self._state = bytearray(num_pages)
        self._readers = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._num_free = num_pages
        self.num_releases = 0  # rises when pages may have become available

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free ones and cached ones nobody reads."""
        return self._num_free + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of pages some request owns, 0..1."""
        return 1.0 - self.num_available / self.num_pages

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` pages for one reader, in as few contiguous runs as possible; None (nothing changed) without room."""
        if count > self.num_available:
            return None
        while self._num_free < count:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            self._state[page] = _FREE
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
        for page in taken:
            self._readers[page] = 1
        self._num_free -= count
        return tuple(taken)

    def match(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The pages of the longest known prefix of `hashes`."""
        found = []
        for key in hashes:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def knows(self, key: bytes) -> bool:
        return key in self._page_of

    def num_unread(self, pages: Iterable[int]) -> int:
        """How many of the pages nobody reads: adopting them makes as many fewer available."""
        return sum(self._readers[page] == 0 for page in pages)

    def adopt(self, pages: Iterable[int]) -> None:
        """Add a reader to pages found by `match`."""
        for page in pages:
            if self._readers[page] == 0:
                del self._cached[page]
                self._state[page] = _OWNED
            self._readers[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Make the content of an owned page findable. The first page published for a page stays the one."""
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
                self._num_free += 1

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]

    def check_integrity(self, owned: Iterable[Sequence[int]] = ()) -> None:
        """Verify every invariant against the page lists of the requests that hold pages.

        Raises:
            AssertionError: with the first page that is wrong.
        """
        readers = [0] * self.num_pages
        for pages in owned:
            for page in pages:
                readers[page] += 1
        for page in range(self.num_pages):
            expected = _OWNED if readers[page] else (_CACHED if page in self._cached else _FREE)
            assert self._readers[page] == readers[page], (
                f"page {page}: {self._readers[page]} readers counted, {readers[page]} requests hold it"
            )
            assert self._state[page] == expected, f"page {page}: state {self._state[page]}, expected {expected}"
            if expected == _FREE:
                assert page not in self._hash_of, f"page {page} is free but has a hash"
        assert self._num_free == self._state.count(_FREE), "free pages miscounted"
        assert len(self._hash_of) == len(self._page_of), "hash index out of step"
        for key, page in self._page_of.items():
            assert self._hash_of.get(page) == key, f"page {page}: hash index out of step"
