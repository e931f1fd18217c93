"""Automatic prefix caching: decide which pages a request adopts from others, waits for, and makes findable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile

from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.prefix_keys import PrefixKeys
from cluster.scheduler.request import Request

# With `share_across_lengths`, reuse KV computed at another length scale only if it covers this fraction of the prompt:
# a short common preamble is not worth a foreign scale.
_MIN_REUSE_FRACTION = 0.25


class PrefixCache:
    """Finds shared prefixes of prompts.

    A page of a prompt is known when it is computed and the pool has its hash: a request adopts it when it is admitted.
    A page is pending while a running request is about to compute it: a request that could adopt it later waits.

    Args:
        keys: hashes the prompts.
        share_across_lengths: also adopt pages of a length scale that hardly differs; a result then depends, a little,
            on which prompts came before.
    """

    def __init__(self, pool: PagePool, page_size: int, keys: PrefixKeys, share_across_lengths: bool = False) -> None:
        self._pool = pool
        self._page_size = page_size
        self._keys = keys
        self._share_across_lengths = share_across_lengths
        self._pending: dict[bytes, int] = {}  # hash -> the sequence that computes it

    def prepare(self, request: Request) -> None:
        """Hash the prompt at its own length scale. Reads nothing that changes: any thread may call it."""
        self._rehash(request, self._own_key(request))

    def must_wait(self, request: Request) -> bool:
        """Return whether another request is computing pages that this one needs: waiting for them saves the work."""
        if request.awaited is not None and request.awaited in self._pending:
            return True
        request.awaited = None
        if self._share_across_lengths:
            self._choose_length(request)
        hashes = self._shareable(request)
        known = stop = len(self._pool.match(hashes))
        while stop < len(hashes) and hashes[stop] in self._pending:
            stop += 1
        stop = self._keys.usable_pages(stop, request.num_prompt)
        if stop > known:
            request.awaited = hashes[stop - 1]
        return request.awaited is not None

    def match(self, request: Request) -> tuple[int, ...]:
        """Return the pages of the longest known prefix that the request can continue after."""
        pages = self._pool.match(self._shareable(request))
        return pages[: self._keys.usable_pages(len(pages), request.num_prompt)]

    def usable(self, request: Request, pages: int) -> int:
        """Return how many of the first `pages`, whose content is known, the request can continue after."""
        return self._keys.usable_pages(min(pages, len(self._shareable(request))), request.num_prompt)

    def begin(self, request: Request, num_adopted: int) -> None:
        """Announce the pages that an admitted request will compute after those it has adopted."""
        request.num_published = num_adopted
        request.scale_len = self._keys.scale_len(request.num_prompt, request.length_key)
        self._keys.remember(request.num_prompt, request.length_key)
        self._pool.note_document(request.pages[:num_adopted], request.document_id)
        for key in () if request.is_private else request.hashes[num_adopted:]:
            if not self._pool.has(key):
                self._pending.setdefault(key, request.sequence)

    def publish(self, request: Request) -> None:
        """Make the prompt pages findable that are computed by now."""
        if request.is_private:
            return
        full = min(request.num_computed // self._page_size, len(request.hashes))
        for index in range(request.num_published, full):
            self._pool.publish(request.pages[index], request.hashes[index], request.document_id)
        self._withdraw(request, request.hashes[request.num_published : full])
        request.num_published = full

    def end(self, request: Request) -> None:
        """Withdraw the pages that a running request will not compute any more."""
        self._withdraw(request, request.hashes[request.num_published :])

    def hide(self, request: Request) -> None:
        """Make nothing findable of a request any more, and let nobody wait for it: its document is gone."""
        request.is_private = True
        self.end(request)

    def _withdraw(self, request: Request, hashes: Sequence[bytes]) -> None:
        for key in hashes:
            if self._pending.get(key) == request.sequence:
                del self._pending[key]

    def _shareable(self, request: Request) -> Sequence[bytes]:
        """Return the hashes of the pages it could adopt: at least one token is computed, to sample from."""
        pages = min((request.num_tokens - 1) // self._page_size, len(request.hashes))
        return request.hashes[: self._keys.usable_pages(pages, request.num_prompt)]

    def _choose_length(self, request: Request) -> None:
        """Hash the prompt under the similar length that most of it is known or pending under; in doubt, its own.

        A resumed request keeps its own length: its output was computed with it.
        """
        own = self._own_key(request)
        similar = [] if request.output else self._keys.similar_keys(request.num_prompt, own)
        if not similar and request.length_key == own:
            return
        limit = len(self._shareable(request))
        min_pages = max(1, int(_MIN_REUSE_FRACTION * request.num_prompt) // self._page_size)
        best, best_pages = own, 0
        for key in (own, *similar):
            is_current = key == request.length_key
            hashes = request.hashes if is_current else self._keys.hashes(request.prompt, key, request.origin)
            pages = sum(1 for _ in takewhile(self._is_known_or_pending, islice(hashes, limit)))
            pages = self._keys.usable_pages(pages, request.num_prompt)
            if pages > best_pages and (key == own or pages >= min_pages):
                best, best_pages = key, pages
        if best != request.length_key:
            self._rehash(request, best)

    def _own_key(self, request: Request) -> int:
        return self._keys.length_key(request.pinned_len or request.num_prompt)

    def _rehash(self, request: Request, key: int) -> None:
        request.length_key = key
        request.num_found, request.is_looked_up = None, False
        request.hashes = request.block_keys = ()
        if request.prompt_logprobs is not None:  # each row is needed: it shares nothing
            return
        request.hashes = list(self._keys.hashes(request.prompt, key, request.origin))
        request.block_keys = list(self._keys.block_keys(request.prompt, key, request.origin))

    def _is_known_or_pending(self, key: bytes) -> bool:
        return key in self._pending or self._pool.has(key)
