"""Between scheduler and KV store, on the engine's thread: what requests wait for is looked up and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from cluster.kv_store.store import KvStore
from cluster.scheduler.request import Request
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.stored_prefix import Load


class StoredKv:
    """Carries out what a scheduler wants of a store that is attached to its engine."""

    def __init__(
        self, scheduler: Scheduler, store: KvStore, on_begin: Callable[[int], None],
        on_loaded: Callable[[int], None], fail: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            on_begin, on_loaded: called with the sequence of a request whose load begins, and when it has ended.
            fail: called when a shard may write to pages that nobody can count on any more.
        """
        self._scheduler = scheduler
        self._store = store
        self._on_begin = on_begin
        self._on_loaded = on_loaded
        self._fail = fail

    def work(self) -> None:
        """Look up and load what requests wait for; they are admitted even when no step can be sent yet."""
        self._scheduler.admit()
        for look_up in self._scheduler.stored.take_look_ups():
            self._store.find(look_up.keys, partial(self._scheduler.stored.found, look_up))
        for load in self._scheduler.take_loads():
            self._on_begin(load.request.sequence)
            self._store.load(load.blocks, partial(_is_wanted, load.request), partial(self._loaded, load), self._fail)

    def offer(self, requests: Iterable[Request]) -> None:
        """Offer what a step has completed of these requests to the store."""
        for request in requests:
            if offers := self._scheduler.stored.take_complete(request):
                self._store.offer(offers)

    def _loaded(self, load: Load, blocks: int) -> None:
        self._scheduler.loaded(load, blocks)
        if _is_wanted(load.request):
            self._on_loaded(load.request.sequence)


def _is_wanted(request: Request) -> bool:
    return request.finish_reason is None
