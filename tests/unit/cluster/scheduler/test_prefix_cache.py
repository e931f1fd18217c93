"""Shared prefixes: which pages a request adopts and waits for, with cells and length scales.

The stages of the harness know what KV depends on (tokens, cell, length scale) and refuse to read anything else.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.prefix_cache import PrefixCache
from cluster.scheduler.prefix_keys import PrefixKeys
from cluster.scheduler.request import FinishReason, Status
from protos.model.spec import ModelSpec
from protos.stage.messages import SampledToken
from tests.support.oracles.integrity import check_prefixes, check_scheduler
from tests.support.rigs.scheduler import (
    GRID,
    PAGE,
    SCALED,
    SPARSE,
    Harness,
    check_cells,
    expected_output,
    finish,
    long_spec,
    request,
    s2,
)

# --- plain attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 64, 67])
def test_a_second_question_adopts_full_pages(size: int):
    document = list(range(1000, 1000 + size))
    harness = Harness()
    harness.add(request(1, [*document, 1]))
    harness.run()
    again = request(2, [*document, 2])
    harness.add(again)
    harness.run()
    assert again.num_cached == size // PAGE * PAGE
    assert again.output == expected_output(again.prompt, 3)


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 2 * PAGE])
def test_the_same_prompt_again_computes_at_least_one_token(size: int):
    harness = Harness()
    harness.add(request(1, range(size)))
    harness.run()
    again = request(2, range(size))
    harness.add(again)
    harness.run()
    assert again.num_cached == (size - 1) // PAGE * PAGE
    assert again.output == expected_output(range(size), 3)


def test_followers_wait_for_the_leader_and_adopt():
    document = list(range(500, 564))  # four pages
    harness = Harness(budget=32)
    leader, *followers = (request(i, [*document, i], 2) for i in range(1, 5))
    harness.add(leader, *followers)
    harness.step()
    assert all(f.status is Status.WAITING for f in followers)
    harness.step()
    harness.step()
    assert all(f.status is Status.RUNNING for f in followers)
    assert all(f.num_cached == 64 for f in followers)
    harness.run()
    assert all(r.output == expected_output(r.prompt, 2) for r in (leader, *followers))
    computed = sum(part.length for plan in harness.plans for part in plan.slices)
    assert computed == 64 + 4 + 4, "the document was computed once"


def test_a_follower_that_shares_only_the_beginning_starts_early():
    harness = Harness(budget=16)
    leader = request(1, range(160), 1)
    follower = request(2, [*range(32), 9, 9, 9], 1)
    harness.add(leader, follower)
    for _ in range(2):
        harness.step()
        assert follower.status is Status.WAITING
    harness.step()
    assert follower.num_cached == 32
    harness.run()
    assert follower.output == expected_output(follower.prompt, 1)


def test_others_pass_a_waiting_follower():
    harness = Harness(budget=16)
    harness.add(request(1, range(100), 1), request(2, range(100), 1), other := request(3, [7], 1))
    harness.step()
    harness.step()
    assert other.status is not Status.WAITING


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_a_follower_takes_over_from_a_cancelled_leader(in_flight: int):
    document = list(range(80))
    harness = Harness(budget=16)
    leader, follower, last = (request(i, [*document, i], 2) for i in (1, 2, 3))
    harness.add(leader, follower, last)
    harness.step()
    for _ in range(in_flight):
        harness.schedule()
    harness.scheduler.stop(leader, FinishReason.CANCELLED)
    assert leader.finish_reason is FinishReason.CANCELLED
    harness.schedule()
    assert follower.num_cached == PAGE, "what the leader had finished is kept"
    while harness.in_flight:
        harness.commit()
    assert last.status is Status.WAITING
    harness.run()
    assert follower.output == expected_output(follower.prompt, 2)
    assert last.num_cached == 80
    check_scheduler(harness.scheduler)


# --- sparse cells and DCA chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "first", "second", "common", "cached"),
    [
        (SPARSE, 201, 209, 200, 192),  # three whole cells
        (SPARSE, 193, 192, 192, 128),  # at least one token is computed, and then its whole cell
        (SPARSE, 193, 193, 193, 192),
        (SPARSE, 191, 300, 191, 128),  # the first one's last cell ends with its prompt
        (SPARSE, 192, 300, 192, 192),
        (SPARSE, 300, 101, 101, 64),
        (SPARSE, 300, 300, 64 + 48, 64),
        (SPARSE, 300, 300, 63, 0),
        (SPARSE, 100, 300, 100, 0),  # dense KV is not sparse KV
        (SPARSE, 300, 100, 100, 0),
        (SPARSE, 100, 90, 80, 80),  # dense ones share by the page
        (GRID, 400, 400, 170, 160),  # cells end at the border of a DCA chunk too
        (GRID, 400, 400, 150, 128),
        (SCALED, 64, 50, 49, 48),  # below the original length the scale is 1 for all
        (SCALED, 64, 65, 48, 0),  # hardly above it, but another scale
        (SCALED, 300, 301, 288, 0),
        (SCALED, 300, 300, 288, 288),
        (SCALED, 400, 100, 90, 0),  # another scale
    ],
)
def test_what_a_second_prompt_adopts(spec: ModelSpec, first: int, second: int, common: int, cached: int):
    harness = Harness(pages=80, spec=spec)
    finish(harness, request(1, range(first)))
    again = request(2, [*range(common), *range(5000, 5000 + second - common)])
    finish(harness, again)
    assert again.num_cached == cached
    check_cells(harness, spec)


@pytest.mark.parametrize("spec", [SPARSE, long_spec(100, 64, 160)])
def test_pages_of_a_last_cell_do_not_stand_for_those_of_a_longer_prompt(spec: ModelSpec):
    harness = Harness(pages=80, spec=spec)
    finish(harness, request(1, range(176)))
    finish(harness, request(2, range(300)))
    third = request(3, range(300))
    finish(harness, third)
    assert third.num_cached == 256


@pytest.mark.parametrize(("first", "second"), [(127, 128), (64, 65), (127, 100), (130, 170)])
@pytest.mark.parametrize("spec", [SPARSE, GRID])
def test_prompts_that_part_inside_a_cell_share_none_of_its_pages(spec: ModelSpec, first: int, second: int):
    harness = Harness(pages=120, spec=spec)
    one, other = (
        [*range(common), *range(base, base + 300 - common)] for common, base in ((first, 2000), (second, 3000))
    )
    finish(harness, request(1, one))
    finish(harness, request(2, other, pinned_len=300))
    finish(harness, again := request(3, other, pinned_len=300))  # the pages of the second, none of the first
    assert again.num_cached >= 256
    check_cells(harness, spec)


@pytest.mark.parametrize("spec", [SPARSE, GRID, SCALED])
def test_questions_on_one_document_wait_and_share(spec: ModelSpec):
    document = list(range(1000, 1640))
    harness = Harness(pages=200, budget=64, spec=spec)
    asked = [request(i, [*document, *range(i)], 2, pinned_len=646) for i in range(1, 7)]
    harness.add(*asked)
    harness.step()
    assert [item.status for item in asked] == [Status.RUNNING] + [Status.WAITING] * 5
    harness.run()
    assert all(item.output == expected_output(item.prompt, 2) for item in asked)
    assert [item.num_cached for item in asked] == [0] + [640] * 5
    assert [item.scale_len for item in asked] == ([0] * 6 if spec is SPARSE else [646] * 5 + [0])
    check_cells(harness, spec)


def test_questions_of_another_job_share_at_the_same_scale_only():
    document = list(range(1000, 1640))
    harness = Harness(pages=400, spec=SCALED)
    finish(harness, request(1, [*document, 1], pinned_len=650), request(2, [*document, *range(10)], pinned_len=650))
    again, other, plain = (
        request(3, [*document, 7], pinned_len=650), request(4, [*document, 8], pinned_len=651),
        request(5, [*document, *range(700, 710)]),
    )  # fmt: skip
    finish(harness, again, other, plain)
    assert [item.num_cached for item in (again, other, plain)] == [640, 0, 640]
    assert [item.scale_len for item in (again, other, plain)] == [650, 651, 0]


def test_a_pinned_length_whose_scale_is_one_is_no_other_scale():
    harness = Harness(pages=200, spec=SCALED)
    finish(harness, request(1, range(50)))
    pinned = request(2, range(49), pinned_len=64)
    finish(harness, pinned)
    assert (pinned.num_cached, pinned.scale_len) == (48, 0)


@settings(max_examples=50, deadline=None)
@given(
    spec=st.sampled_from((GRID, SCALED)), seed=st.integers(0, 1 << 30),
    lengths=st.lists(st.integers(290, 310), max_size=8),
    pins=st.lists(st.sampled_from((0, 0, 310, 311)), min_size=9, max_size=9), budget=st.sampled_from((16, 64, 500)),
)  # fmt: skip
def test_neighbours_change_no_length_scale(
    spec: ModelSpec, seed: int, lengths: list[int], pins: list[int], budget: int
) -> None:
    """Prompts with one beginning and nearby lengths: in any order, each is computed as if it were alone."""
    rng = random.Random(seed)
    prompts = [[*range(280), *(1000 * i + j for j in range(length - 280))] for i, length in enumerate([300, *lengths])]
    asked = [request(i, prompt, 2, pinned_len=pin) for i, (prompt, pin) in enumerate(zip(prompts, pins, strict=False))]
    rng.shuffle(asked)
    harness = Harness(pages=400, budget=budget, spec=spec)
    while asked:
        harness.add(*(asked.pop() for _ in range(min(len(asked), rng.randint(1, 3)))))
        for _ in range(rng.randint(0, 4)):
            harness.step()
    harness.run()
    for item in harness.requests.values():
        assert item.output == expected_output(item.prompt, 2)
        assert (item.scale_len or item.num_prompt) == (item.pinned_len or item.num_prompt)
    slices = [part for plan in harness.plans for part in plan.slices]
    assert all(part.scale_len == harness.requests[part.sequence].scale_len for part in slices)


def test_a_follower_does_not_wait_for_pages_it_cannot_use():
    harness = Harness(pages=100, budget=64, spec=SPARSE)
    harness.add(request(1, range(300), 1), follower := request(2, [*range(64 + 48), *range(900, 1100)], 1))
    harness.step()
    harness.step()
    assert follower.num_cached == 64
    assert follower.status is Status.RUNNING, "the second cell is not the same"
    harness.run()


# --- shared across lengths --------------------------------------------------------------------------------------------


def nearest_outside(length: int) -> tuple[int, int]:
    """The largest length whose factor is within half a percent, and the next one."""
    other = length
    while s2(other + 1) / s2(length) - 1 < 0.005:
        other += 1
    return other, other + 1


@pytest.mark.parametrize("length", [300, 641])
def test_scales_are_adopted_up_to_half_a_percent(length: int):
    within, outside = nearest_outside(length)
    for other, shared in ((within, True), (outside, False)):
        harness = Harness(pages=200, spec=SCALED, share_across_lengths=True)
        finish(harness, request(1, range(other)))
        again = request(2, range(length))
        finish(harness, again)
        assert (again.num_cached > 0, again.scale_len) == (shared, other if shared else 0)
        assert {part.scale_len for plan in harness.plans for part in plan.slices if part.sequence == 2} == {
            again.scale_len
        }


def test_the_scale_of_one_is_adopted_and_named():
    harness = Harness(pages=80, spec=SCALED, share_across_lengths=True)
    finish(harness, request(1, range(60)), above := request(2, [*range(48), *range(100, 117)]))
    assert above.num_prompt == 65
    assert (above.num_cached, above.scale_len) == (48, 64)


def test_its_own_scale_is_preferred():
    harness = Harness(pages=200, spec=SCALED, share_across_lengths=True)
    finish(harness, request(1, range(300)), request(2, range(1000, 1305)))
    finish(harness, request(3, [*range(1000, 1064), *range(241)]))  # another document of 305 tokens
    again = request(4, [*range(288), *range(700, 717)])
    finish(harness, again)
    assert (again.num_prompt, again.num_cached, again.scale_len) == (305, 288, 300)
    own = request(5, [*range(288), *range(800, 812)])
    finish(harness, own)
    assert (own.num_prompt, own.num_cached, own.scale_len) == (300, 288, 0)


def test_a_few_common_words_do_not_bend_the_scale():
    harness = Harness(pages=200, spec=SCALED, share_across_lengths=True)
    finish(harness, request(1, range(640)))
    other = request(2, [*range(64), *range(5000, 5577)])
    finish(harness, other)
    assert (other.num_prompt, other.num_cached, other.scale_len) == (641, 0, 0)


def test_a_resumed_prompt_keeps_its_own_scale():
    harness = Harness(pages=200, spec=SCALED, share_across_lengths=True)
    finish(harness, request(1, range(640)))
    resumed = request(2, range(641), 4)
    for token in expected_output(range(641), 2):
        resumed.accept(SampledToken(2, token))
    finish(harness, resumed)
    assert (resumed.num_cached, resumed.scale_len) == (0, 0)


def test_a_follower_of_a_cancelled_leader_returns_to_its_own_scale():
    harness = Harness(pages=200, budget=64, spec=SCALED, share_across_lengths=True)
    leader, follower = request(1, range(640), 1), request(2, range(641), 1)
    harness.add(leader, follower)
    assert harness.scheduler.schedule() is not None
    assert follower.status is Status.WAITING
    assert follower.length_key == 640
    harness = Harness(pages=200, budget=64, spec=SCALED, share_across_lengths=True)
    leader, follower = request(1, range(640), 1), request(2, range(641), 1)
    harness.add(leader, follower)
    harness.step()
    harness.scheduler.stop(leader, FinishReason.CANCELLED)
    harness.pool.release(harness.pool.allocate(harness.pool.num_available))  # evicts what is cached
    harness.run()
    assert follower.output == expected_output(range(641), 1)
    assert (follower.num_cached, follower.scale_len, follower.length_key) == (0, 0, 641)


# --- the cache alone -------------------------------------------------------------------------------------------------


def test_pages_are_pending_from_admission_to_computation():
    pool = PagePool(16)
    cache = PrefixCache(pool, PAGE, PrefixKeys(b"root", PAGE, None))
    first, second, third = (request(i, [*range(3 * PAGE), i]) for i in (1, 2, 3))
    for item in (first, second, third):
        cache.prepare(item)
    assert not cache.must_wait(first)
    first.pages = pool.allocate(4) or ()
    cache.begin(first, 0)
    assert cache.must_wait(second)
    assert second.awaited == first.hashes[2], "the last page that both need"
    first.num_computed = 2 * PAGE + 5
    cache.publish(first)
    assert (first.num_published, cache.match(second)) == (2, first.pages[:2])
    assert cache.must_wait(second)
    cache.end(first)
    assert not cache.must_wait(second), "nobody computes the third page any more"
    check_prefixes(cache, [])
    second.pages = pool.allocate(2, cache.match(second)) or ()
    cache.begin(second, 2)
    with pytest.raises(AssertionError, match="pages are pending for requests that do not run"):
        check_prefixes(cache, [])
    assert cache.must_wait(third)
    second.num_computed = 3 * PAGE
    cache.publish(second)
    assert not cache.must_wait(third)
    assert cache.match(third) == second.pages[:3]


def test_the_first_to_announce_a_page_computes_it():
    pool = PagePool(16)
    cache = PrefixCache(pool, PAGE, PrefixKeys(b"root", PAGE, None))
    first, second, third = (request(i, [*range(PAGE), i]) for i in (1, 2, 3))
    for item in (first, second, third):
        cache.prepare(item)
    cache.begin(first, 0)
    cache.begin(second, 0)
    cache.end(second)
    assert cache.must_wait(third), "the first still computes it"
    cache.end(first)
    assert not cache.must_wait(third)
