"""The scheduler on models of long contexts: cells are never cut, and any traffic keeps the promises.

The stages of the harness know what KV depends on (tokens, cell, length scale) and refuse to read anything else.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.request import FinishReason, Status
from cluster.scheduler.scheduler import Scheduler
from protos.model.grid import last_cut
from protos.model.spec import ModelSpec
from protos.stage.messages import SampledToken
from tests.support.oracles.integrity import check_scheduler
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

# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 101, 127, 128, 129, 193, 320, 321, 641])
@pytest.mark.parametrize("budget", [17, 64, 100, 300])
@pytest.mark.parametrize("spec", [SPARSE, GRID])
def test_a_sparse_prompt_is_computed_by_the_cell(spec: ModelSpec, size: int, budget: int):
    harness = Harness(pages=80, budget=budget, spec=spec)
    finish(harness, request(1, range(size), 4))
    check_cells(harness, spec)
    assert harness.scheduler.is_sparse(harness.plans[0].slices[0]) == (size > 100)


def test_decodes_and_short_prompts_ride_along_with_cells():
    harness = Harness(pages=200, budget=64, spec=SPARSE)
    long, talking = request(1, range(1000), 1), request(2, range(2000, 2010), 30)
    harness.add(talking)
    harness.step()
    harness.add(long, short := request(3, range(3000, 3031), 1))
    harness.step()
    assert {part.sequence: part.length for part in harness.plans[-1].slices} == {1: 64, 2: 1, 3: 31}
    assert short.finish_reason is FinishReason.LENGTH
    for _ in range(10):
        harness.step()
        assert {part.sequence: part.length for part in harness.plans[-1].slices} == {1: 64, 2: 1}
    harness.run()
    check_cells(harness, SPARSE)


def test_a_shorter_sparse_prompt_does_not_wait_for_a_long_one():
    harness = Harness(pages=200, budget=64, spec=SPARSE)
    harness.add(long := request(1, range(1500), 1))
    harness.step()
    harness.add(short := request(2, range(6000, 6256), 1))
    steps = 0
    while short.finish_reason is None:
        harness.step()
        steps += 1
    assert steps <= 2 * 4 + 1, "every second cell is its own"
    assert long.num_computed < 12 * 64
    harness.run()
    check_cells(harness, SPARSE)


@pytest.mark.parametrize(("cell", "distance"), [(72, 0), (64, 168)])
def test_cells_must_be_multiples_of_the_page(cell: int, distance: int):
    with pytest.raises(ValueError, match="must be multiples of 16"):
        Scheduler(Harness().pool, PAGE, 64, 8, spec=long_spec(100, cell, distance))


@pytest.mark.parametrize("size", [192, 193, 210])
def test_a_resumed_sparse_prompt_computes_its_tokens_densely(size: int):
    harness = Harness(pages=200, budget=100, spec=SPARSE)
    resumed = request(1, range(size), 20)
    for token in expected_output(range(size), 17):
        resumed.accept(SampledToken(1, token))
    finish(harness, resumed)
    check_cells(harness, SPARSE)
    assert any(part.start == size and part.length == 17 for plan in harness.plans for part in plan.slices)


# --- any traffic ------------------------------------------------------------------------------------------------------

SPECS = [
    SPARSE, GRID, SCALED, long_spec(0, 16, 48, original=16), long_spec(33, 48), long_spec(70, 32, 64, original=40),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 1 << 30))
@pytest.mark.slow
def test_random_lives(spec: ModelSpec, seed: int):
    rng = random.Random(seed)
    shares = rng.random() < 0.5
    page_size = rng.choice((4, PAGE))
    harness = Harness(
        pages=rng.choice((40, 200)) * PAGE // page_size, page_size=page_size, budget=rng.choice((1, 7, 64, 100, 500)),
        seqs=rng.choice((1, 2, 5, 16)), spec=spec, share_across_lengths=shares,
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
            harness.add(waiting.pop())
        if rng.random() < 0.05 and harness.requests:
            victim = harness.requests[rng.choice(sorted(harness.requests))]
            if victim.finish_reason is None:
                harness.scheduler.stop(victim, FinishReason.CANCELLED)
        if len(harness.in_flight) < 3 and rng.random() < 0.7 and harness.schedule():
            continue
        if harness.in_flight:
            harness.commit()
        elif not waiting and harness.schedule() is None:
            break
    check_cells(harness, spec)
    check_scheduler(harness.scheduler)
    assert harness.pool.usage == 0
    assert harness.count(Status.FINISHED) == len(harness.requests)
    for item in harness.requests.values():
        wanted = expected_output(item.prompt, item.stop.max_tokens)
        assert item.output == wanted[: len(item.output)]
        assert item.finish_reason is FinishReason.CANCELLED or len(item.output) == len(wanted)
        assert item.num_cached <= last_cut(spec, item.num_prompt, item.num_prompt)
        assert shares or not item.scale_len
        if item.scale_len:
            assert abs(s2(item.scale_len, spec) / s2(item.num_prompt, spec) - 1) < 0.005
