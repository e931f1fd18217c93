"""Allocate KV pages and find them by their content. Pure Python: the pages themselves live in the workers.

A page (`kv_cache.page_size` tokens) is free (no content), owned (one or more requests read it) or cached (nobody reads
it, but others can find its content by its hash). Of cached pages those are evicted first whose block is stored, since
it can be read back; among them, and then among the others, the oldest.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence

from protos.stage.messages import KvBlock

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
        self._pins: Counter[int] = Counter()  # pages that are being written to the store
        self._blocks: dict[bytes, KvBlock] = {}  # blocks of the store whose pages are all here
        self._documents_of: dict[int, tuple[str, ...]] = {}  # of pages that can be found: the documents they belong to
        self._blocks_of: dict[int, set[bytes]] = {}  # page -> keys of stored blocks that begin alike and share it
        self.num_releases = 0  # rises when pages may have become available

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free and cached ones, but for those that are pinned."""
        return self._state.count(_FREE) + len(self._cached) - sum(map(self._is_idle, self._pins))

    @property
    def usage(self) -> float:
        """Share of the pages that requests own, 0..1."""
        return 1.0 - (self._state.count(_FREE) + len(self._cached)) / self.num_pages

    def allocate(self, count: int, adopted: Sequence[int] = ()) -> tuple[int, ...] | None:
        """Return the pages of one more reader: `adopted` (found by `match`) and `count` new ones.

        New pages lie in as few contiguous runs as possible. Returns None (and changes nothing) without room.
        """
        if count > self.num_available - sum(self._is_idle(page) and page not in self._pins for page in adopted):
            return None
        self.adopt(adopted)
        self._evict(count - self._state.count(_FREE))
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

    def publish(self, page: int, key: bytes, document_id: str = "") -> None:
        """Make the content of an owned page findable. Of several pages with one hash, the first stays the one found.

        Args:
            document_id: to whose prompt it belongs, if to one.
        """
        assert self._readers[page] > 0, "only an owned page can be published"
        if key not in self._page_of and page not in self._hash_of:
            self._page_of[key] = page
            self._hash_of[page] = key
        if (found := self._page_of.get(key)) is not None:
            self.note_document([found], document_id)

    def note_document(self, pages: Iterable[int], document_id: str) -> None:
        """Note that pages that can be found belong to the prompt of a document ("": of none)."""
        for page in pages if document_id else ():
            if page in self._hash_of and document_id not in (known := self._documents_of.get(page, ())):
                self._documents_of[page] = (*known, document_id)

    def keep_documents(self, living: Collection[str]) -> None:
        """Let nobody find the pages any more whose documents are all gone; those that nobody reads become free."""
        known = {name for names in self._documents_of.values() for name in names}
        if gone := {name for name in known if name not in living}:
            self.unpublish([page for page, names in self._documents_of.items() if gone.issuperset(names)])
            for page, names in self._documents_of.items():
                if not gone.isdisjoint(names):
                    self._documents_of[page] = tuple(name for name in names if name not in gone)

    def release(self, pages: Sequence[int]) -> None:
        """Take one reader from each page; unread pages become cached or free. Later pages are evicted first."""
        self.num_releases += 1
        for page in reversed(pages):
            self._readers[page] -= 1
            assert self._readers[page] >= 0, f"page {page} released too often"
            if self._readers[page] == 0:
                self._retire(page)

    def release_all(self) -> None:
        """Take every reader and pin away: all pages become cached or free. For the scheduler of another pipeline."""
        self.num_releases += 1
        self._pins.clear()
        owned = [page for page in range(self.num_pages) if self._readers[page]]
        published = {page: order for order, page in enumerate(self._hash_of)}
        for page in sorted(owned, key=lambda page: -published.get(page, 0)):
            self._readers[page] = 0
            self._retire(page)

    # --- stored blocks -----------------------------------------------------------------------------------------------

    def pin(self, hashes: Sequence[bytes]) -> tuple[int, ...] | None:
        """Return the pages with these hashes, which keep their content until `unpin`; None if one is gone."""
        pages = self.match(hashes)
        if len(pages) < len(hashes):
            return None
        self._pins.update(pages)
        return pages

    def unpin(self, pages: Iterable[int]) -> None:
        """Let pages be evicted again that `pin` has returned."""
        self.num_releases += 1
        for page in pages:
            self._pins[page] -= 1
            if self._pins[page] <= 0:
                del self._pins[page]

    def mark_stored(self, block: KvBlock) -> None:
        """Note that the store has what is in the pages of a block; one with a page that nobody finds is ignored."""
        if not all(page in self._hash_of for page in block.pages):
            return
        self._blocks[block.key] = block
        for page in block.pages:
            self._blocks_of.setdefault(page, set()).add(block.key)

    def is_stored(self, key: bytes) -> bool:
        """Return whether a stored block is here in full."""
        return key in self._blocks

    def unmark_stored(self, keys: Iterable[bytes]) -> None:
        """Note that the store has dropped blocks."""
        for key in keys:
            block = self._blocks.pop(key, None)
            for page in block.pages if block is not None else ():
                self._blocks_of[page].discard(key)
                if not self._blocks_of[page]:
                    del self._blocks_of[page]

    def forget_blocks(self, keys: Iterable[bytes]) -> None:
        """Let nobody find the pages of stored blocks any more, and free them unless they are read."""
        for key in keys:
            if (block := self._blocks.get(key)) is not None:
                self.unpublish(block.pages)

    def stored_blocks(self) -> list[KvBlock]:
        """Return the stored blocks whose pages are all here, by their positions."""
        return sorted(self._blocks.values(), key=lambda block: block.start)

    def published(self) -> list[int]:
        """Return the pages that can be found."""
        return list(self._hash_of)

    def unpublish(self, pages: Iterable[int]) -> None:
        """Let nobody find these pages any more; those that nobody reads become free."""
        for page in pages:
            self._forget(page)
            if self._state[page] == _CACHED and page not in self._pins:
                del self._cached[page]
                self._state[page] = _FREE
        self.num_releases += 1

    # --- internals ---------------------------------------------------------------------------------------------------

    def _is_idle(self, page: int) -> bool:
        return self._readers[page] == 0

    def _retire(self, page: int) -> None:
        """Make a page that has lost its last reader cached or free; a pinned one keeps its content in any case."""
        if page in self._hash_of or page in self._pins:
            self._state[page] = _CACHED
            self._cached[page] = None
        else:
            self._state[page] = _FREE

    def _evict(self, count: int) -> None:
        """Free `count` cached pages."""
        if count <= 0:
            return
        idle = [page for page in self._cached if page not in self._pins]
        victims = [page for page in idle if page in self._blocks_of][:count]
        victims += [page for page in idle if page not in self._blocks_of][: count - len(victims)]
        for page in victims:
            del self._cached[page]
            self._forget(page)
            self._state[page] = _FREE

    def _forget(self, page: int) -> None:
        """Drop the hash of a page, and its blocks from those that are here in full."""
        key = self._hash_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        self._documents_of.pop(page, None)
        for block in self._blocks_of.pop(page, ()):
            self._blocks.pop(block, None)
