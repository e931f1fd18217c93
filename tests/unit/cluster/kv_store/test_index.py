"""Which blocks are known, and which of them go first."""

from __future__ import annotations

import random
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv_store.index import KvIndex
from protos.stage import stage_pb2 as pb


def chain(index: KvIndex, name: str, blocks: int, used: float, size: int = 100, node: str = "n") -> list[bytes]:
    keys = [f"{name}{number}".encode() for number in range(blocks)]
    for number, key in enumerate(keys):
        index.add(key, keys[number - 1] if number else b"", 32 * number, {node: size}, used)
    return keys


def test_a_prefix_ends_with_the_first_block_that_is_missing_or_doubtful() -> None:
    index = KvIndex()
    keys = chain(index, "a", 5, 1.0)
    assert index.prefix([*keys, b"other"]) == (5, 500)
    index.doubt(keys[3], 2.0)
    assert index.prefix(keys) == (3, 500)
    assert not index.has(keys[3])
    assert index.node_bytes == {"n": 500}, "it is still there"
    index.remove(keys[1:2])
    assert (index.prefix(keys), index.node_bytes, len(index)) == ((1, 400), {"n": 400}, 4)
    assert index.prefix(keys[2:]) == (0, 300), "nothing begins with them"


def test_a_prefix_of_keys_in_any_order_is_the_longest_chain() -> None:
    index = KvIndex()
    keys, other = chain(index, "a", 5, 1.0), chain(index, "b", 3, 1.0)
    index.add(b"branch", keys[3], 4 * 32, {"n": 50}, 1.0)
    assert index.prefix({*keys, *other, b"branch", b"unknown"}) == (5, 850)
    index.remove([keys[1]])
    assert index.prefix([*reversed(keys), *other]) == (3, 700)
    assert index.prefix([]) == (0, 0)


def test_chains_come_with_parents_first_and_without_what_nothing_leads_to() -> None:
    index = KvIndex()
    keys, other = chain(index, "a", 4, 1.0), chain(index, "b", 2, 1.0)
    branch = b"branch"
    index.add(branch, keys[1], 2 * 32, {"n": 50}, 1.0)
    asked = [branch, *reversed(keys), *other, b"unknown"]
    found = index.chained(asked)
    assert {key for key, _, _ in found} == {*keys, *other, branch}
    for at, (key, parent, start) in enumerate(found):
        assert (not parent) == (not start)
        assert not parent or (parent, start - 32) in {(k, s) for k, _, s in found[:at]}, key
    index.doubt(keys[1], 2.0)
    assert {key for key, _, _ in index.chained(asked)} == {keys[0], *other}
    assert index.chained([]) == []


def test_a_block_counts_when_every_node_has_it() -> None:
    index = KvIndex()
    index.add(b"a", b"", 0, {"one": 10}, 1.0)
    assert index.has(b"a")
    index.add(b"b", b"", 0, {"one": 10, "two": 10}, 1.0)
    assert not index.has(b"a")
    assert index.has(b"b")
    index.add(b"a", b"", 0, {"two": 5}, 2.0)
    assert index.has(b"a")
    assert (index.size(b"a"), index.node_bytes) == (15, {"one": 20, "two": 15})


def test_later_blocks_of_the_chain_that_was_used_least_recently_go_first() -> None:
    index = KvIndex()
    old, new = chain(index, "old", 5, 1.0), chain(index, "new", 5, 2.0)
    assert index.victims({"n": 1000}, frozenset) == []
    assert index.victims({"n": 800}, frozenset) == [old[4], old[3], old[2]], "down to 95 % of the quota"
    assert index.victims({"n": 100}, frozenset) == [*reversed(old), *reversed(new)]
    index.touch(old[:2], 3.0)
    assert index.victims({"n": 800}, frozenset) == [old[4], old[3], old[2]]
    assert index.victims({"n": 600}, frozenset) == [old[4], old[3], old[2], new[4], new[3]]
    assert index.victims({"n": 800}, lambda: frozenset(old)) == [new[4], new[3], new[2]], "what is retained stays"
    assert index.victims({"n": 800}, lambda: frozenset(old + new)) == []
    assert index.victims({"other": 0}, frozenset) == []


def test_protected_blocks_go_last_until_their_time_is_over() -> None:
    now = [10.0]
    index = KvIndex(lambda: now[0])
    old, new = chain(index, "old", 5, 1.0), chain(index, "new", 5, 2.0)
    index.protect(dict.fromkeys(old, 20.0))
    index.protect(dict.fromkeys(old, 15.0))  # the later time counts
    assert index.victims({"n": 800}, frozenset) == [new[4], new[3], new[2]]
    assert index.victims({"n": 100}, frozenset) == [*reversed(new), *reversed(old)], "nobody fills the store for good"
    assert index.expired(5.0, frozenset) == new
    now[0] = 20.0
    assert index.victims({"n": 800}, frozenset) == [old[4], old[3], old[2]]
    assert index.expired(5.0, frozenset) == [*old, *new]


def test_blocks_may_be_protected_before_they_are_stored() -> None:
    index = KvIndex(lambda: 10.0)
    index.protect({b"a0": 20.0})
    keys = chain(index, "a", 1, 1.0)
    chain(index, "b", 9, 2.0)
    assert (keys[0] in index.victims({"n": 200}, frozenset), index.expired(1.5, frozenset)) == (False, [])


def test_a_block_is_as_recent_as_those_after_it_and_one_without_predecessor_goes_first() -> None:
    index = KvIndex()
    keys = chain(index, "a", 5, 1.0)
    other = chain(index, "b", 3, 2.0)
    index.touch(keys[4:], 5.0)
    index.remove([other[0]])
    assert index.victims({"n": 600}, frozenset) == [other[2], other[1]]
    assert index.expired(4.0, frozenset) == other[1:]
    assert index.expired(6.0, lambda: frozenset(keys)) == other[1:]
    assert set(index.expired(6.0, frozenset)) == {*keys, *other[1:]}


def test_a_new_block_stays_whose_predecessor_another_head_wrote_while_the_folder_was_listed() -> None:
    now = 10_000.0
    index = KvIndex(lambda: now)
    entry = pb.KvEntry(key=b"child", parent=b"parent", start=32, bytes=70, used=9_900.0)
    index.replace({"n": [entry]})
    assert index.expired(9_000.0, frozenset) == []
    now += 7200
    assert index.expired(9_000.0, frozenset) == [b"child"]


def test_a_listing_replaces_everything_but_what_is_known_of_use() -> None:
    index = KvIndex()
    keys = chain(index, "a", 3, 9.0)
    index.doubt(keys[1], 9.5)

    def entry(key: bytes, start: int, used: float) -> pb.KvEntry:
        return pb.KvEntry(key=key, parent=keys[0] if start else b"", start=start, bytes=70, used=used)

    index.replace({"n": [entry(keys[0], 0, 1.0), entry(keys[1], 32, 1.0), entry(b"new", 32, 11.0)], "m": []})
    assert (len(index), index.node_bytes) == (3, {"n": 210, "m": 0})
    assert index.expired(8.0, frozenset) == []
    assert set(index.expired(10.0, frozenset)) == {keys[1]}, "the first one is as recent as the new one after it"
    assert not index.has(keys[1])


def test_a_listing_says_nothing_of_what_changes_while_it_is_read() -> None:
    index = KvIndex()
    keys = chain(index, "a", 3, 1.0)
    entries = [pb.KvEntry(key=key, start=32 * n, parent=keys[n - 1] if n else b"", bytes=100, used=1.0)
               for n, key in enumerate(keys)]  # fmt: skip
    index.begin_listing()
    index.remove(keys[2:])
    new = chain(index, "b", 2, 1.0)
    index.remove(new[:1])
    index.add(new[0], b"", 0, {"n": 7}, 1.0)
    index.replace({"n": entries})
    assert (index.prefix(keys), index.prefix(new)) == ((2, 200), (2, 107))
    assert index.node_bytes == {"n": 307}
    index.begin_listing()
    index.replace({"n": entries})
    assert (index.prefix(keys), index.prefix(new)) == ((3, 300), (0, 0))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 30), limit=st.integers(0, 3000))
def test_victims_bring_every_node_below_its_limit_and_leave_no_orphan(seed: int, limit: int) -> None:
    rng, index = random.Random(seed), KvIndex()
    keys: list[bytes] = []
    for name in "abc":
        keys += chain(index, name, rng.randint(1, 12), rng.random(), rng.randint(1, 200), rng.choice("nm"))
    index.touch(rng.sample(keys, len(keys) // 2), 2.0)
    victims = index.victims({"n": limit, "m": 500}, frozenset)
    assert len(set(victims)) == len(victims)
    before = index.node_bytes
    index.remove(victims)
    for node, most in (("n", limit), ("m", 500)):
        assert index.node_bytes.get(node, 0) <= most
        assert before.get(node, 0) > most or index.node_bytes.get(node, 0) == before.get(node, 0)
    left = set(keys) - set(victims)
    for key in left:
        name, number = chr(key[0]), int(key[1:])
        assert not number or f"{name}{number - 1}".encode() in left


def test_a_block_that_was_just_written_counts_whatever_nodes_are_known() -> None:
    index = KvIndex()
    chain(index, "old", 1, 1.0)
    index.add(b"a", b"", 0, {}, 2.0)  # by a pipeline that has not read yet on which nodes its shards are
    assert index.has(b"a")
    changes = pb.KvEntry(key=b"a", start=0, bytes=70, used=2.0)
    index.begin_listing()
    index.add(b"b", b"a", 32, {}, 3.0)
    index.replace({"n": [changes]})
    assert (index.has(b"a"), index.has(b"b"), index.node_bytes) == (True, True, {"n": 70})
    index.begin_listing()
    index.add(b"a", b"", 0, {}, 4.0)
    index.replace({"n": [changes, pb.KvEntry(key=b"b", parent=b"a", start=32, bytes=30)], "m": []})
    assert (index.size(b"a"), index.has(b"a"), index.has(b"b")) == (70, True, False), "the other node has it not"


def test_the_engine_waits_for_nobody_who_reads_or_sorts_a_large_index() -> None:
    index = KvIndex()
    keys = chain(index, "a", 3, 1.0)
    done = threading.Event()

    def use() -> None:
        index.touch(keys, 9.0)
        assert index.has(keys[0])
        done.set()

    with index._lock:
        threading.Thread(target=use, daemon=True).start()
        assert done.wait(5)
    assert index.expired(8.0, ()) == []


def test_blocks_whose_files_lag_behind_their_use_come_once_until_a_listing_shows_it_again() -> None:
    index = KvIndex()
    keys = chain(index, "a", 4, 100.0)
    assert index.take_unsaved(0) == []
    index.touch(keys[:3], 110.0)
    index.touch(keys[2:], 130.0)
    index.touch(keys[3:], 130.0, is_saved=True)
    assert index.take_unsaved(10) == keys[2:3]
    assert index.take_unsaved(9.9) == keys[:2]
    assert index.take_unsaved(0) == []
    listed = [pb.KvEntry(key=key, start=32 * at, bytes=100, used=100.0) for at, key in enumerate(keys)]
    later = [pb.KvEntry(key=key, start=32 * at, bytes=100, used=500.0) for at, key in enumerate(keys)]
    index.replace({"n": listed, "m": later})
    assert index.take_unsaved(10) == keys, "one node of two lags behind what the other one has"
    index.replace({"n": later, "m": later})
    assert index.take_unsaved(0) == []
