"""The page pool against a model that knows every reader and every hash, with its invariants after each operation."""

import itertools
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.scheduler.page_pool import PagePool
from tests.support.oracles.integrity import check_pool


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class PoolMachine(RuleBasedStateMachine):
    """Requests hold lists of pages; a hash is findable while its page is owned or cached."""

    @initialize(size=st.integers(1, 24))
    def begin(self, size: int) -> None:
        self.pool = PagePool(size)
        self.size = size
        self.held: list[tuple[int, ...]] = []
        self.pages: dict[int, int] = {}  # number of a hash -> page
        self.cached: list[int] = []  # pages, oldest first
        self.next_hash = 0

    def owned(self) -> set[int]:
        return {page for pages in self.held for page in pages}

    @rule(count=st.integers(0, 26))
    def allocate(self, count: int) -> None:
        room = self.size - len(self.owned())
        before = (self.pool.num_available, list(self.cached))
        got = self.pool.allocate(count)
        if count > room:
            assert got is None
            assert before == (self.pool.num_available, self.cached)
            return
        assert got is not None
        assert len(set(got)) == count
        assert not set(got) & self.owned()
        free = room - len(self.cached)
        for _ in range(max(0, count - free)):  # the oldest go, and no more than needed
            gone = self.cached.pop(0)
            self.pages = {key: page for key, page in self.pages.items() if page != gone}
        assert not set(got) & set(self.cached)
        self.held.append(got)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from([pages for pages in self.held if pages]))
        page = data.draw(st.sampled_from(pages))
        number = data.draw(st.integers(0, self.next_hash))
        self.next_hash = max(self.next_hash, number + 1)
        self.pool.publish(page, key(number))
        if number not in self.pages and page not in self.pages.values():
            self.pages[number] = page

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.integers(0, self.next_hash), max_size=4, unique=True))
        pages = self.pool.match([key(number) for number in numbers])
        assert pages == tuple(self.pages[number] for number in takewhile(self.pages.__contains__, numbers))
        self.pool.adopt(pages)
        self.cached = [page for page in self.cached if page not in pages]
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(pages)
        unread = [page for page in reversed(pages) if page not in self.owned()]
        self.cached.extend(page for page in unread if page in self.pages.values())

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        check_pool(self.pool, self.held)
        assert self.pool.num_available == self.size - len(self.owned())
        assert self.pool.usage == pytest.approx(len(self.owned()) / self.size)
        for number in range(self.next_hash):
            assert self.pool.has(key(number)) == (number in self.pages)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def runs(pages: tuple[int, ...]) -> int:
    return 1 + sum(b != a + 1 for a, b in itertools.pairwise(pages))


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16])
def test_an_empty_pool_gives_one_run(count: int):
    pages = PagePool(16).allocate(count)
    assert pages is not None
    assert len(pages) == count
    assert runs(pages) == 1


def holes(*free: int) -> PagePool:
    """A pool whose free pages are exactly `free`."""
    pool = PagePool(32)
    pool.allocate(32)
    pool.release(free)
    return pool


@pytest.mark.parametrize(
    ("free", "count", "expected"),
    [
        ((0, 3, 4, 5, 9), 3, 1),
        ((0, 3, 4, 5, 9), 4, 2),
        ((0, 1, 2, 10, 11), 5, 2),  # a run of three and one of two
        ((0, 10, 11, 12, 13, 14, 20, 21), 7, 2),
        ((0, 2, 4, 6), 4, 4),
    ],
)
def test_as_few_runs_as_possible(free: tuple[int, ...], count: int, expected: int):
    pages = holes(*free).allocate(count)
    assert pages is not None
    assert runs(pages) == expected


def test_without_room_nothing_changes():
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert pages is not None
    pool.publish(pages[0], key(1))
    pool.release(pages)
    assert pool.allocate(5) is None
    assert pool.match([key(1)]) == (pages[0],)
    assert pool.num_available == 4
    assert pool.allocate(4) is not None
    assert pool.allocate(0) == ()
    assert pool.allocate(1) is None


def test_the_oldest_content_is_evicted_first_and_later_pages_before_earlier_ones():
    pool = PagePool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    assert first is not None
    assert second is not None
    for number, page in enumerate(first + second):
        pool.publish(page, key(number))
    pool.release(second)
    pool.release(first)
    order, known = [], {0, 1, 2, 3}
    for _ in range(4):
        pool.allocate(1)
        left = {number for number in known if pool.has(key(number))}
        order.extend(known - left)
        known = left
    assert order == [3, 2, 1, 0]


def test_adopting_again_makes_content_young():
    pool = PagePool(2)
    pages = pool.allocate(2)
    assert pages is not None
    for number, page in enumerate(pages):
        pool.publish(page, key(number))
    pool.release(pages)  # page 1 is the older one now
    pool.adopt(pages[1:])
    pool.release(pages[1:])
    pool.allocate(1)
    assert pool.has(key(1))
    assert not pool.has(key(0))


def test_the_first_page_with_a_hash_stays_the_one():
    pool = PagePool(2)
    pool.allocate(2)
    pool.publish(0, key(1))
    pool.publish(1, key(1))
    pool.publish(0, key(2))
    assert pool.match([key(1)]) == (0,)
    assert not pool.has(key(2))
    check_pool(pool, [(0, 1)])


def test_misuse_is_noticed():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="only an owned page"):
        pool.publish(0, key(0))
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 0 released too often"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="page 1: 0 readers counted, 1 requests hold it"):
        check_pool(PagePool(2), [(1,)])
    with pytest.raises(ValueError, match="num_pages: 0"):
        PagePool(0)


def test_adopted_pages_are_kept_while_others_are_evicted():
    pool = PagePool(4)
    pages = pool.allocate(4)
    assert pages == (0, 1, 2, 3)
    for page in pages:
        pool.publish(page, key(page))
    pool.release(pages)
    assert pool.allocate(3, adopted=(2, 3)) is None, "two of the four available are adopted"
    assert pool.num_available == 4
    assert pool.allocate(1, adopted=(2, 3)) == (2, 3, 1)
    assert pool.allocate(1, adopted=(2,)) == (2, 0), "an owned page can be adopted once more"
    assert [pool.has(key(number)) for number in range(4)] == [False, False, True, True]
    check_pool(pool, [(2, 3, 1), (2, 0)])


def test_a_page_that_is_written_to_the_store_is_given_to_nobody_although_it_is_forgotten_and_released() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)  # type: ignore[misc]
    pool.publish(page, b"a")
    assert pool.pin([b"a"]) == (page,)
    pool.unpublish([page])  # a document with another block that begins alike is deleted
    pool.release([page])
    assert pool.num_available == 1
    assert page not in pool.allocate(1)  # type: ignore[operator]
    assert pool.allocate(1) is None
    pool.unpin([page])
    assert pool.allocate(1) == (page,)


def test_pages_go_with_the_last_of_their_documents() -> None:
    pool = PagePool(5)
    pages = pool.allocate(5)
    assert pages is not None
    for index, name in enumerate(["a", "a", "b", "", "a"]):
        pool.publish(pages[index], key(index), name)
    pool.note_document(pages[1:2], "b")
    pool.note_document(pages[3:4], "")
    pool.release(pages[:4])
    pool.keep_documents({"a", "b"})
    assert pool.published() == list(pages)
    pool.keep_documents({"b"})
    assert pool.published() == list(pages[1:4])
    assert pool.num_available == 4, "one that is read is not free, only not found"
    pool.keep_documents({"a"})
    assert pool.published() == list(pages[3:4])
    pool.release(pages[4:])
    assert pool.num_available == 5
    again = pool.allocate(1)
    assert again is not None
    pool.publish(again[0], key(7), "a")
    twin = pool.allocate(1)
    assert twin is not None
    pool.publish(twin[0], key(7), "c")
    pool.keep_documents({"c"})
    assert again[0] in pool.published(), "it was computed for another document as well"
