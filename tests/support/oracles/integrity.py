"""Invariants of the scheduler: its pages, its hash index and its pending prefixes against the requests that run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future

from cluster.engine.engine import Engine
from cluster.scheduler.page_pool import _CACHED, _FREE, _OWNED, PagePool
from cluster.scheduler.prefix_cache import PrefixCache
from cluster.scheduler.scheduler import Scheduler


def check_engine(engine: Engine) -> None:
    """Verify the scheduler of a running engine on the engine's thread; raises AssertionError."""
    done: Future[None] = Future()

    def check() -> None:
        try:
            check_scheduler(engine.scheduler)
        except AssertionError as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    engine._inbox.put(check)
    done.result(timeout=30)


def check_scheduler(scheduler: Scheduler) -> None:
    """Verify pages and pending prefixes against the requests that run; raises AssertionError."""
    loading = {sequence: load.request for sequence, load in scheduler._loading.items()}
    check_pool(scheduler.pool, (request.pages for request in (*scheduler._running.values(), *loading.values())))
    check_prefixes(scheduler._prefixes, {*scheduler._running, *loading})


def check_prefixes(cache: PrefixCache, running: Collection[int]) -> None:
    """Verify that only running sequences have pending pages; raises AssertionError."""
    assert set(cache._pending.values()) <= set(running), "pages are pending for requests that do not run"


def expected_state(pool: PagePool, page: int) -> int:
    return _OWNED if pool._readers[page] else (_CACHED if page in pool._cached else _FREE)


def check_pool(pool: PagePool, owned: Iterable[Sequence[int]] = ()) -> None:
    """Verify every invariant of a pool.

    Args:
        owned: the pages of each request that holds some.

    Raises:
        AssertionError: with the first page that is wrong.
    """
    readers = [0] * pool.num_pages
    for pages in owned:
        for page in pages:
            readers[page] += 1
    for page in range(pool.num_pages):
        expected = expected_state(pool, page)
        assert pool._readers[page] == readers[page], (
            f"page {page}: {pool._readers[page]} readers counted, {readers[page]} requests hold it"
        )
        assert pool._state[page] == expected, f"page {page}: state {pool._state[page]}, expected {expected}"
        if expected == _FREE:
            assert page not in pool._hash_of, f"page {page} is free but has a hash"
    assert len(pool._hash_of) == len(pool._page_of), "hash index out of step"
    for key, page in pool._page_of.items():
        assert pool._hash_of.get(page) == key, f"page {page}: hash index out of step"
    for page in pool._blocks_of:
        assert page in pool._hash_of, f"page {page} belongs to a stored block but nobody finds it"
    for key, block in pool._blocks.items():
        assert all(key in pool._blocks_of[page] for page in block.pages), "a stored block lacks pages"
    for page, count in pool._pins.items():
        assert count > 0, f"page {page}: {count} pins"
        assert expected_state(pool, page) != _FREE, f"page {page} is pinned but free"
