"""The scheduler on models of long contexts: cells are never cut, only sound prefixes are shared, scales are adopted.

The stages of the bench know what KV depends on (tokens, cell, length scale) and refuse to read anything else.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.request import FinishReason, Status
from cluster.scheduler.scheduler import Scheduler
from protos.model.grid import is_sparse, largest_cell, next_cut, split, stable_prefix
from protos.model.spec import DualChunkSpec, ModelSpec
from protos.stage.messages import SampledToken
from tests.support.rigs.scheduler import PAGE, Bench, evict_all, expected_output, long_spec, request

SPARSE = long_spec(100, 64)
GRID = long_spec(100, 64, 160, original=64)  # with DCA and a temperature
SCALED = long_spec(None, distance=160, original=64)  # dense DCA with a temperature


def s2(length: int, spec: ModelSpec = SCALED) -> float:
    assert isinstance(spec.dual_chunk, DualChunkSpec)
    return spec.dual_chunk.temperature(length) ** 2


def finish(bench: Bench, *items) -> None:
    bench.add(*items)
    bench.run()
    for item in items:
        assert item.output == expected_output(item.prompt, item.stop.max_tokens)


def check_cells(bench: Bench, spec: ModelSpec) -> None:
    """Every sparse slice is whole cells, every dense one stays within its DCA chunk, steps keep their bound."""
    for plan in bench.plans:
        assert plan.num_tokens <= bench.budget + largest_cell(spec)
        for part in plan.slices:
            stop = part.start + part.length
            for first, end in split(spec, part.start, stop, part.prompt_len):
                if is_sparse(spec, first, part.prompt_len):
                    assert first == 0 or next_cut(spec, first - 1, part.prompt_len) == first
                    assert end == next_cut(spec, first, part.prompt_len)
                else:
                    assert (first, end) == (part.start, stop)


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 101, 127, 128, 129, 193, 320, 321, 641])
@pytest.mark.parametrize("budget", [17, 64, 100, 300])
@pytest.mark.parametrize("spec", [SPARSE, GRID])
def test_a_sparse_prompt_is_computed_by_the_cell(spec: ModelSpec, size: int, budget: int):
    bench = Bench(pages=80, budget=budget, spec=spec)
    finish(bench, request(1, range(size), 4))
    check_cells(bench, spec)
    assert bench.scheduler.is_sparse(bench.plans[0].slices[0]) == (size > 100)


def test_decodes_and_short_prompts_ride_along_with_cells():
    bench = Bench(pages=200, budget=64, spec=SPARSE)
    long, talking = request(1, range(1000), 1), request(2, range(2000, 2010), 30)
    bench.add(talking)
    bench.step()
    bench.add(long, short := request(3, range(3000, 3031), 1))
    bench.step()
    assert {part.sequence: part.length for part in bench.plans[-1].slices} == {1: 64, 2: 1, 3: 31}
    assert short.finish_reason is FinishReason.LENGTH
    for _ in range(10):
        bench.step()
        assert {part.sequence: part.length for part in bench.plans[-1].slices} == {1: 64, 2: 1}
    bench.run()
    check_cells(bench, SPARSE)


def test_a_shorter_sparse_prompt_does_not_wait_for_a_long_one():
    bench = Bench(pages=200, budget=64, spec=SPARSE)
    bench.add(long := request(1, range(1500), 1))
    bench.step()
    bench.add(short := request(2, range(6000, 6256), 1))
    steps = 0
    while short.finish_reason is None:
        bench.step()
        steps += 1
    assert steps <= 2 * 4 + 1, "every second cell is its own"
    assert long.num_computed < 12 * 64
    bench.run()
    check_cells(bench, SPARSE)


@pytest.mark.parametrize(("cell", "distance"), [(72, 0), (64, 168)])
def test_cells_must_be_multiples_of_the_page(cell: int, distance: int):
    with pytest.raises(ValueError, match="must be multiples of 16"):
        Scheduler(Bench().pool, PAGE, 64, 8, spec=long_spec(100, cell, distance))


# --- prefixes ---------------------------------------------------------------------------------------------------------


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
        (SCALED, 64, 65, 48, 48),  # hardly above it
        (SCALED, 400, 100, 90, 0),  # another scale
    ],
)
def test_what_a_second_prompt_adopts(spec: ModelSpec, first: int, second: int, common: int, cached: int):
    bench = Bench(pages=80, spec=spec)
    finish(bench, request(1, range(first)))
    again = request(2, [*range(common), *range(5000, 5000 + second - common)])
    finish(bench, again)
    assert again.num_cached == cached
    check_cells(bench, spec)


@pytest.mark.parametrize("spec", [SPARSE, long_spec(100, 64, 160)])
def test_pages_of_a_last_cell_do_not_stand_for_those_of_a_longer_prompt(spec: ModelSpec):
    bench = Bench(pages=80, spec=spec)
    finish(bench, request(1, range(176)))
    finish(bench, request(2, range(300)))
    third = request(3, range(300))
    finish(bench, third)
    assert third.num_cached == 256


@pytest.mark.parametrize("spec", [SPARSE, GRID, SCALED])
def test_questions_on_one_document_wait_and_share(spec: ModelSpec):
    document = list(range(1000, 1640))
    bench = Bench(pages=200, budget=64, spec=spec)
    asked = [request(i, [*document, *range(i)], 2) for i in range(1, 7)]
    bench.add(*asked)
    bench.step()
    assert [item.status for item in asked] == [Status.RUNNING] + [Status.WAITING] * 5
    bench.run()
    assert all(item.output == expected_output(item.prompt, 2) for item in asked)
    assert [item.num_cached for item in asked] == [0] + [640] * 5
    assert {item.scale_len for item in asked[1:]} == ({0} if spec is SPARSE else {641})
    check_cells(bench, spec)


def test_a_follower_does_not_wait_for_pages_it_cannot_use():
    bench = Bench(pages=100, budget=64, spec=SPARSE)
    bench.add(request(1, range(300), 1), follower := request(2, [*range(64 + 48), *range(900, 1100)], 1))
    bench.step()
    bench.step()
    assert follower.num_cached == 64
    assert follower.status is Status.RUNNING, "the second cell is not the same"
    bench.run()


# --- length scales ----------------------------------------------------------------------------------------------------


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
        bench = Bench(pages=200, spec=SCALED)
        finish(bench, request(1, range(other)))
        again = request(2, range(length))
        finish(bench, again)
        assert (again.num_cached > 0, again.scale_len) == (shared, other if shared else 0)
        assert {part.scale_len for plan in bench.plans for part in plan.slices if part.sequence == 2} == {
            again.scale_len
        }


def test_the_scale_of_one_is_adopted_and_named():
    bench = Bench(pages=80, spec=SCALED)
    finish(bench, request(1, range(60)), above := request(2, [*range(48), *range(100, 117)]))
    assert above.num_prompt == 65
    assert (above.num_cached, above.scale_len) == (48, 64)


def test_its_own_scale_is_preferred():
    bench = Bench(pages=200, spec=SCALED)
    finish(bench, request(1, range(300)), request(2, range(1000, 1305)))
    finish(bench, request(3, [*range(1000, 1064), *range(241)]))  # another document of 305 tokens
    again = request(4, [*range(288), *range(700, 717)])
    finish(bench, again)
    assert (again.num_prompt, again.num_cached, again.scale_len) == (305, 288, 300)
    own = request(5, [*range(288), *range(800, 812)])
    finish(bench, own)
    assert (own.num_prompt, own.num_cached, own.scale_len) == (300, 288, 0)


def test_a_few_common_words_do_not_bend_the_scale():
    bench = Bench(pages=200, spec=SCALED)
    finish(bench, request(1, range(640)))
    other = request(2, [*range(64), *range(5000, 5577)])
    finish(bench, other)
    assert (other.num_prompt, other.num_cached, other.scale_len) == (641, 0, 0)


def test_a_resumed_prompt_keeps_its_own_scale():
    bench = Bench(pages=200, spec=SCALED)
    finish(bench, request(1, range(640)))
    resumed = request(2, range(641), 4)
    for token in expected_output(range(641), 2):
        resumed.accept(SampledToken(2, token))
    finish(bench, resumed)
    assert (resumed.num_cached, resumed.scale_len) == (0, 0)


@pytest.mark.parametrize("size", [192, 193, 210])
def test_a_resumed_sparse_prompt_computes_its_tokens_densely(size: int):
    bench = Bench(pages=200, budget=100, spec=SPARSE)
    resumed = request(1, range(size), 20)
    for token in expected_output(range(size), 17):
        resumed.accept(SampledToken(1, token))
    finish(bench, resumed)
    check_cells(bench, SPARSE)
    assert any(part.start == size and part.length == 17 for plan in bench.plans for part in plan.slices)


def test_a_follower_of_a_cancelled_leader_returns_to_its_own_scale():
    bench = Bench(pages=200, budget=64, spec=SCALED)
    leader, follower = request(1, range(640), 1), request(2, range(641), 1)
    bench.add(leader, follower)
    assert bench.scheduler.schedule() is not None
    assert follower.status is Status.WAITING
    assert follower.length_key == 640
    bench = Bench(pages=200, budget=64, spec=SCALED)
    leader, follower = request(1, range(640), 1), request(2, range(641), 1)
    bench.add(leader, follower)
    bench.step()
    bench.scheduler.stop(leader, FinishReason.CANCELLED)
    evict_all(bench.pool)
    bench.run()
    assert follower.output == expected_output(range(641), 1)
    assert (follower.num_cached, follower.scale_len, follower.length_key) == (0, 0, 641)


# --- any traffic ------------------------------------------------------------------------------------------------------

SPECS = [
    SPARSE, GRID, SCALED, long_spec(0, 16, 48, original=16), long_spec(33, 48), long_spec(70, 32, 64, original=40),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 1 << 30))
def test_random_lives(spec: ModelSpec, seed: int):
    rng = random.Random(seed)
    page_size = rng.choice((4, PAGE))
    bench = Bench(
        pages=rng.choice((40, 200)) * PAGE // page_size, page_size=page_size, budget=rng.choice((1, 7, 64, 100, 500)),
        seqs=rng.choice((1, 2, 5, 16)), spec=spec,
    )  # fmt: skip
    waiting = []
    for sequence in range(14):
        shared = rng.choice((0, 47, 48, 96, 130, 161, 200))
        prompt = [rng.choice((0, 1)) * 1000 + i for i in range(shared)] + [
            rng.randrange(50) for _ in range(rng.choice((1, 2, 15, 67, 97)))
        ]
        waiting.append(request(sequence, prompt, rng.choice((1, 2, 7))))
        if rng.random() < 0.2:
            for token in expected_output(prompt, waiting[-1].stop.max_tokens - 1):
                waiting[-1].accept(SampledToken(sequence, token))
    while True:
        while waiting and rng.random() < 0.5:
            bench.add(waiting.pop())
        if rng.random() < 0.05 and bench.requests:
            victim = bench.requests[rng.choice(sorted(bench.requests))]
            if victim.finish_reason is None:
                bench.scheduler.stop(victim, FinishReason.CANCELLED)
        if len(bench.in_flight) < 3 and rng.random() < 0.7 and bench.schedule():
            continue
        if bench.in_flight:
            bench.commit()
        elif not waiting and bench.schedule() is None:
            break
    check_cells(bench, spec)
    bench.scheduler.check_integrity()
    assert bench.pool.usage == 0
    assert (bench.count(Status.RUNNING), bench.count(Status.WAITING)) == (0, 0)
    for item in bench.requests.values():
        wanted = expected_output(item.prompt, item.stop.max_tokens)
        assert item.output == wanted[: len(item.output)]
        assert item.finish_reason is FinishReason.CANCELLED or len(item.output) == len(wanted)
        assert item.num_cached <= stable_prefix(spec, item.num_prompt)
        if item.scale_len:
            assert abs(s2(item.scale_len, spec) / s2(item.num_prompt, spec) - 1) < 0.005
