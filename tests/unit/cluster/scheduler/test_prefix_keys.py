"""What a hash of a page stands for, and under which lengths pages are found."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from itertools import islice

import pytest

from cluster.scheduler import prefix_keys
from cluster.scheduler.prefix_keys import Origin, PrefixKeys, Private, page_hashes
from protos.model.spec import ModelSpec
from tests.support.rigs.scheduler import GRID, PAGE, PLAIN, SCALED, SPARSE, s2


def hashes(tokens: Sequence[int], root: bytes) -> list[bytes]:
    return list(page_hashes(tokens, 2, root))


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 0), (15, 0), (16, 1), (17, 1), (31, 1), (32, 2), (67, 4)])
def test_only_full_pages_have_a_hash(tokens: int, pages: int):
    assert len(list(page_hashes(range(tokens), 16, b""))) == pages


def test_a_hash_stands_for_everything_before_it():
    one = hashes([1, 2, 3, 4], b"root")
    assert one[0] == hashlib.sha256(b"root" + array("I", [1, 2]).tobytes()).digest()
    assert one[1] == hashlib.sha256(one[0] + array("I", [3, 4]).tobytes()).digest()
    assert hashes([1, 2, 9, 9], b"root")[0] == one[0]
    assert hashes([9, 2, 3, 4], b"root")[1] != one[1]
    assert hashes([1, 2, 3, 4], b"other")[0] != one[0]
    assert hashes((1, 2, 3, 4), b"root") == one


ROOT = b"root"


def keys(spec: ModelSpec | None) -> PrefixKeys:
    return PrefixKeys(ROOT, PAGE, spec)


@pytest.mark.parametrize(
    ("spec", "prompt_len", "pages"),
    [
        (None, 67, 4), (PLAIN, 67, 4),
        (SPARSE, 100, 6),  # dense: not above the threshold
        (SPARSE, 101, 4), (SPARSE, 128, 8),  # sparse: whole cells of 64 tokens
        (GRID, 161, 10),  # a cell ends with its DCA chunk of 160 tokens too
    ],
)  # fmt: skip
def test_pages_that_depend_on_the_end_of_the_prompt_have_no_hash(
    spec: ModelSpec | None, prompt_len: int, pages: int
) -> None:
    assert len(list(keys(spec).hashes(range(prompt_len), 0))) == pages


def test_sparse_rows_and_other_length_keys_have_hashes_of_their_own() -> None:
    prompt = range(160)
    plain, dense = (list(keys(spec).hashes(prompt, 0)) for spec in (None, SCALED))
    assert plain == dense
    others = [next(keys(spec).hashes(prompt, key)) for spec, key in ((SPARSE, 0), (SCALED, 160), (SCALED, 161))]
    others += [next(keys(None).hashes(prompt, 0, origin)) for origin in (Origin("other"), Origin("", "alice"))]
    assert len({plain[0], *others}) == 6


def test_this_cluster_s_kernels_are_the_same_by_name() -> None:
    mine, other = (PrefixKeys(ROOT, PAGE, None, PAGE, family) for family in ("torch", "compiled"))
    prompt = range(160)
    assert list(mine.block_keys(prompt, 0)) == list(other.block_keys(prompt, 0, Origin("torch")))
    assert list(mine.block_keys(prompt, 0)) != list(other.block_keys(prompt, 0))


@pytest.mark.parametrize("spec", [None, SPARSE, GRID, SCALED])
@pytest.mark.parametrize("prompt_len", [31, 32, 100, 193, 400])
def test_keys_of_blocks_depend_on_no_page_size(spec: ModelSpec | None, prompt_len: int) -> None:
    prompt = range(prompt_len)
    small, large = (PrefixKeys(ROOT, page_size, spec, 32) for page_size in (8, 32))
    assert list(small.block_keys(prompt, 0)) == list(large.block_keys(prompt, 0)) == list(large.hashes(prompt, 0))
    assert len(list(small.block_keys(prompt, 0))) == len(list(small.hashes(prompt, 0))) // 4
    assert list(keys(spec).block_keys(prompt, 0)) == [], "without a store there are none"


@pytest.mark.parametrize("spec", [PLAIN, SPARSE])
def test_blocks_of_another_size_have_other_keys(spec: ModelSpec) -> None:
    """Under sparse prefill the first block of a cell depends on all of it, whatever the size of the block."""
    prompt = range(20 * PAGE)
    sizes = [PrefixKeys(ROOT, PAGE, spec, block_tokens=count * PAGE) for count in (1, 2, 4)]
    found = [key for one in sizes for key in one.block_keys(prompt, 0)]
    assert len(set(found)) == len(found)


def test_hashes_cost_as_much_as_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(prefix_keys.hashlib, "sha256", lambda data: calls.append(data) or sha256(data))
    assert len(list(islice(keys(None).hashes(range(10_000), 0), 3))) == 3
    assert len(calls) == 4, "the root, and three pages"


@pytest.mark.parametrize(
    ("spec", "prompt_len", "key"), [(None, 500, 0), (SPARSE, 500, 0), (SCALED, 64, 0), (SCALED, 65, 65)]
)
def test_length_key(spec: ModelSpec | None, prompt_len: int, key: int) -> None:
    assert keys(spec).length_key(prompt_len) == key
    assert keys(spec).scale_len(prompt_len, key) == 0, "its own length is not named"


def test_scale_len_names_the_length_of_adopted_pages() -> None:
    assert keys(SCALED).scale_len(300, 305) == 305
    assert keys(SCALED).scale_len(65, 0) == 64, "of a length scale of 1: the longest prompt that has it"


@pytest.mark.parametrize(("pages", "usable"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (10, 10), (11, 10)])
def test_a_sparse_prompt_continues_after_whole_cells(pages: int, usable: int) -> None:
    assert keys(GRID).usable_pages(pages, 400) == usable
    assert keys(GRID).usable_pages(pages, 100) == pages, "dense rows continue after any page"
    assert keys(None).usable_pages(pages, 400) == pages


def test_similar_keys_come_nearest_first_and_of_the_same_kind_only() -> None:
    dense = keys(SCALED)
    for length in (297, 301, 310, 300, 290, 305):
        dense.remember(length, dense.length_key(length))
    similar = dense.similar_keys(300, 300)
    assert similar == [301, 297, 305]
    assert all(abs(s2(length) / s2(300) - 1) < 0.005 for length in similar)
    mixed = keys(GRID)
    mixed.remember(100, 100)  # at the threshold: dense
    assert mixed.similar_keys(101, 101) == []
    mixed.remember(102, 102)
    assert mixed.similar_keys(101, 101) == [102]


def test_only_the_lengths_used_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_keys, "_MAX_LENGTHS", 2)
    lengths = keys(SCALED)
    for length in (301, 302, 301, 303):
        lengths.remember(length, length)
    assert lengths.similar_keys(300, 300) == [301, 303]


@pytest.mark.parametrize("spec", [None, PLAIN, SPARSE, GRID])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 67, 128, 160, 193, 320])
def test_pages_that_reach_beyond_what_is_shared_are_of_one_owner(spec: ModelSpec | None, start: int) -> None:
    prompt = range(320)
    plain, ann, bob = (
        [*keys(spec).hashes(prompt, 0, Origin(private=private))]
        for private in (None, Private(start, "ann"), Private(start, "bob"))
    )
    common = next((at for at, (one, other) in enumerate(zip(ann, bob, strict=True)) if one != other), len(ann))
    assert plain[:common] == ann[:common]
    assert not {*plain, *bob}.intersection(ann[common:])
    changed = [*prompt]
    changed[start:] = [9] * (320 - start)  # what the others do not depend on
    assert [*keys(spec).hashes(changed, 0)][:common] == plain[:common]
    if spec is None or spec is PLAIN:
        assert common == start // PAGE
