"""Computed blocks that are to be stored, by key: they hold no pages, so nothing waits for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence

from cluster.scheduler.stored_prefix import Offer

_MAX_TOKENS = 1 << 23  # of all offers: some 50 MB, with the hashes of their pages


class Backlog:
    """A bounded queue of offers, each key once. Any thread may call it; one takes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offers: deque[Offer] = deque()
        self._tokens = 0  # of all of them
        self._keys: set[tuple[bytes, str]] = set()
        self._is_closed = False
        self.busy: frozenset[bytes] = frozenset()  # keys that were taken and are not `done`

    def __len__(self) -> int:
        return len(self._offers)

    def put(self, offers: Sequence[Offer]) -> int:
        """Queue offers; returns how many of them there is no room for."""
        dropped = 0
        with self._changed:
            for offer in offers:
                if (offer.key, offer.document_id) in self._keys:
                    continue
                if self._tokens + len(offer.token_ids) > _MAX_TOKENS:
                    dropped += 1
                    continue
                self._offers.append(offer)
                self._tokens += len(offer.token_ids)
                self._keys.add((offer.key, offer.document_id))
            self._changed.notify_all()
        return dropped

    def take(self, limit: int) -> list[Offer]:
        """Wait for offers; returns up to `limit` that follow each other in one prompt, none once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._offers or self._is_closed)
            taken: list[Offer] = []
            while self._offers and not self._is_closed and len(taken) < limit:
                if taken and self._offers[0].parent != taken[-1].key:
                    break
                taken.append(self._offers.popleft())
            self._tokens -= sum(len(offer.token_ids) for offer in taken)
            self._keys.difference_update((offer.key, offer.document_id) for offer in taken)
            self.busy = frozenset(offer.key for offer in taken)
            return taken

    def done(self) -> None:
        """Note that what was taken last is written, or given up."""
        with self._changed:
            self.busy = frozenset()
            self._changed.notify_all()

    def drop_request(self, sequence: int) -> int:
        """Drop every offer of a request; returns how many."""
        return self._keep(lambda offer: offer.sequence != sequence)

    def discard(self, keys: Collection[bytes]) -> None:
        """Drop the offers with these keys."""
        self._keep(lambda offer: offer.key not in keys)

    def wait_empty(self, within_s: float) -> bool:
        """Return whether everything was taken and written within a time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_closed or not (self._offers or self.busy), within_s)

    def close(self) -> None:
        """Let `take` return nothing from now on."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _keep(self, wanted: Callable[[Offer], bool]) -> int:
        with self._changed:
            before = len(self._offers)
            self._offers = deque(filter(wanted, self._offers))
            self._tokens = sum(len(offer.token_ids) for offer in self._offers)
            self._keys = {(offer.key, offer.document_id) for offer in self._offers}
            return before - len(self._offers)
