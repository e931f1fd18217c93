"""The block pool against a model that knows every reader and every page, with its invariants after each operation."""

import hashlib
import itertools
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.scheduler.block_pool import BlockPool, page_hashes


def page(number: int) -> bytes:
    return number.to_bytes(32, "big")


class PoolMachine(RuleBasedStateMachine):
    """Requests hold lists of blocks; a page is findable while its block is owned or cached."""

    @initialize(size=st.integers(1, 24))
    def begin(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.size = size
        self.held: list[tuple[int, ...]] = []
        self.pages: dict[int, int] = {}  # page -> block
        self.cached: list[int] = []  # blocks, oldest first
        self.next_page = 0

    def owned(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

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
            self.pages = {key: block for key, block in self.pages.items() if block != gone}
        assert not set(got) & set(self.cached)
        self.held.append(got)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from([blocks for blocks in self.held if blocks]))
        block = data.draw(st.sampled_from(blocks))
        number = data.draw(st.integers(0, self.next_page))
        self.next_page = max(self.next_page, number + 1)
        self.pool.publish(block, page(number))
        if number not in self.pages and block not in self.pages.values():
            self.pages[number] = block

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.integers(0, self.next_page), max_size=4, unique=True))
        found = self.pool.match([page(number) for number in numbers])
        expected = []
        for number in numbers:
            if number not in self.pages:
                break
            expected.append(self.pages[number])
        assert list(found) == expected
        self.pool.adopt(found)
        self.cached = [block for block in self.cached if block not in found]
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)
        unread = [block for block in reversed(blocks) if block not in self.owned()]
        self.cached.extend(block for block in unread if block in self.pages.values())

    @rule()
    def clear(self) -> None:
        assert self.pool.clear_cache() == len(self.cached)
        self.pages = {key: block for key, block in self.pages.items() if block not in self.cached}
        self.cached = []

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.held)
        assert self.pool.num_available == self.size - len(self.owned())
        assert self.pool.usage == pytest.approx(len(self.owned()) / self.size)
        for number in range(self.next_page):
            assert self.pool.knows(page(number)) == (number in self.pages)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def runs(blocks: tuple[int, ...]) -> int:
    return 1 + sum(b != a + 1 for a, b in itertools.pairwise(blocks))


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16])
def test_an_empty_pool_gives_one_run(count: int):
    blocks = BlockPool(16).allocate(count)
    assert blocks is not None
    assert len(blocks) == count
    assert runs(blocks) == 1


def holes(*free: int) -> BlockPool:
    """A pool whose free blocks are exactly `free`."""
    pool = BlockPool(32)
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
    blocks = holes(*free).allocate(count)
    assert blocks is not None
    assert runs(blocks) == expected


def test_without_room_nothing_changes():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.publish(blocks[0], page(1))
    pool.release(blocks)
    assert pool.allocate(5) is None
    assert pool.match([page(1)]) == (blocks[0],)
    assert pool.num_available == 4
    assert pool.allocate(4) is not None
    assert pool.allocate(0) == ()
    assert pool.allocate(1) is None


def test_the_oldest_content_is_evicted_first_and_later_pages_before_earlier_ones():
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    assert first is not None
    assert second is not None
    for number, block in enumerate(first + second):
        pool.publish(block, page(number))
    pool.release(second)
    pool.release(first)
    order, known = [], {0, 1, 2, 3}
    for _ in range(4):
        pool.allocate(1)
        left = {number for number in known if pool.knows(page(number))}
        order.extend(known - left)
        known = left
    assert order == [3, 2, 1, 0]


def test_adopting_again_makes_content_young():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    for number, block in enumerate(blocks):
        pool.publish(block, page(number))
    pool.release(blocks)  # page 1 is the older one now
    pool.adopt(blocks[1:])
    pool.release(blocks[1:])
    pool.allocate(1)
    assert pool.knows(page(1))
    assert not pool.knows(page(0))


def test_the_first_block_of_a_page_stays_the_one():
    pool = BlockPool(2)
    pool.allocate(2)
    pool.publish(0, page(1))
    pool.publish(1, page(1))
    pool.publish(0, page(2))
    assert pool.match([page(1)]) == (0,)
    assert not pool.knows(page(2))
    pool.check_integrity([(0, 1)])


def test_misuse_is_noticed():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="only an owned block"):
        pool.publish(0, page(0))
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="block 0 released too often"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="block 1: 0 readers counted, 1 requests hold it"):
        BlockPool(2).check_integrity([(1,)])
    with pytest.raises(ValueError, match="num_blocks: 0"):
        BlockPool(0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 0), (15, 0), (16, 1), (17, 1), (31, 1), (32, 2), (67, 4)])
def test_only_full_pages_have_a_hash(tokens: int, pages: int):
    assert len(page_hashes(range(tokens), 16, b"")) == pages


def test_a_hash_stands_for_everything_before_it():
    one = page_hashes([1, 2, 3, 4], 2, b"root")
    assert one[0] == hashlib.sha256(b"root" + array("I", [1, 2]).tobytes()).digest()
    assert one[1] == hashlib.sha256(one[0] + array("I", [3, 4]).tobytes()).digest()
    assert page_hashes([1, 2, 9, 9], 2, b"root")[0] == one[0]
    assert page_hashes([9, 2, 3, 4], 2, b"root")[1] != one[1]
    assert page_hashes([1, 2, 3, 4], 2, b"other")[0] != one[0]
    assert page_hashes((1, 2, 3, 4), 2, b"root") == one
