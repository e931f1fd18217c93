"""The scheduler: cases by hand, and random lives of many requests against stages that check every slot they read."""

import random
from itertools import pairwise

import pytest

from cluster.scheduler.request import FinishReason, Status
from cluster.scheduler.scheduler import DoesNotFit
from tests.support.oracles.integrity import check_prefixes, check_scheduler
from tests.support.rigs.scheduler import PAGE, Harness, expected_output, request

# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 63, 64, 65, 193])
@pytest.mark.parametrize("budget", [1, 17, 64])
def test_chunks_cover_the_prompt_once(size: int, budget: int):
    harness = Harness(budget=budget)
    item = request(1, range(size), 4)
    harness.add(item)
    harness.run()
    parts = [plan.slices[0] for plan in harness.plans]
    assert [part.start for part in parts] == [0, *(part.start + part.length for part in parts[:-1])]
    assert all(part.length <= budget for part in parts)
    prefill = [part for part in parts if part.start < size]
    assert len(prefill) == -(-size // budget)
    assert [part.sample is not None for part in prefill] == [False] * (len(prefill) - 1) + [True]
    assert item.output == expected_output(range(size), 4)
    assert item.finish_reason is FinishReason.LENGTH
    assert [part.sample.token_index for part in parts if part.sample] == [0, 1, 2, 3]
    assert harness.pool.usage == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "pages"), [(16, 1, 1), (16, 2, 2), (17, 1, 2), (1, 16, 1), (1, 17, 2)]
)
def test_pages_for_the_prompt_and_every_token_fed_back(prompt: int, max_tokens: int, pages: int):
    harness = Harness(pages=pages)
    item = request(1, range(prompt), max_tokens)
    assert harness.scheduler.pages_needed(item) == pages
    harness.add(item)
    harness.run()
    assert len(item.output) == max_tokens
    assert harness.plans[-1].slices[0].num_pages == pages, "the last page is used"


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = Harness(pages=2).scheduler
    scheduler.prepare(request(1, range(30), 3))
    with pytest.raises(DoesNotFit, match=r"prompt of 31 tokens with max_tokens 3: .* holds 32 tokens; at most 30 "):
        scheduler.prepare(request(1, range(31), 3))
    with pytest.raises(DoesNotFit, match="at most 0 prompt tokens"):
        scheduler.prepare(request(1, [1], 34))


def test_stop_ids_end_a_request():
    prompt = list(range(20))
    third = expected_output(prompt, 3)[2]
    harness = Harness()
    item = request(1, prompt, 10, [third])
    harness.add(item)
    harness.run()
    assert item.output[-1] == third
    assert len(item.output) == 3
    assert item.finish_reason is FinishReason.STOP


def test_short_prompts_ride_along_with_a_long_one():
    harness = Harness(pages=200, budget=32)
    long, short = request(1, range(1000), 1), request(2, range(2000, 2020), 3)
    harness.add(long)
    harness.step()
    harness.add(short)
    steps = 0
    while short.finish_reason is None:
        harness.step()
        steps += 1
    assert steps == 2 + 2  # 16 + 4 tokens, then two decode steps
    assert long.num_computed == 32 + 16 + 16 + 31 + 31  # a step that others share stays short
    harness.run()
    assert long.output == expected_output(range(1000), 1)


def test_penalised_requests_bring_their_history_once():
    harness = Harness()
    harness.add(request(1, [5, 3, 5], 3, repetition_penalty=1.2), request(2, [4], 2))
    harness.run()
    of_first = [part.sample for plan in harness.plans for part in plan.slices if part.sequence == 1]
    assert [sample.history for sample in of_first] == [[3, 5], (), ()]
    assert all(p.sample.history == () for plan in harness.plans for p in plan.slices if p.sequence == 2)


# --- admission -------------------------------------------------------------------------------------------------------


def test_without_room_requests_wait_in_order():
    harness = Harness(pages=4)
    first, second, third = request(1, range(40), 2), request(2, range(100, 140), 2), request(3, [1], 1)
    harness.add(first, second, third)
    harness.step()
    assert [r.status for r in (first, second, third)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    assert second.pages == ()
    harness.run()
    assert all(r.output == expected_output(r.prompt, r.stop.max_tokens) for r in (first, second, third))
    starts = [part.sequence for plan in harness.plans for part in plan.slices if part.start == 0]
    assert starts == [1, 2, 3], "nobody overtakes"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_than_max_num_seqs_run(limit: int):
    harness = Harness(seqs=limit)
    harness.add(*(request(i, [i] * (i + 1), 4) for i in range(6)))
    while harness.schedule():
        assert harness.count(Status.RUNNING) <= limit
        assert len(harness.in_flight[-1].slices) <= limit
        harness.commit()
    assert all(r.finish_reason is FinishReason.LENGTH for r in harness.requests.values())


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancel_while_waiting():
    harness = Harness(seqs=1)
    harness.add(request(1, [1]), waiting := request(2, [2]))
    harness.step()
    harness.scheduler.stop(waiting, FinishReason.CANCELLED)
    assert waiting.finish_reason is FinishReason.CANCELLED
    harness.run()
    assert waiting.output == []
    assert not any(2 in plan.released for plan in harness.plans), "the stages never knew it"


def test_cancel_with_a_sampling_step_in_flight_drops_the_token():
    harness = Harness()
    harness.add(item := request(1, range(20), 5))
    harness.step()
    harness.schedule()
    before = list(item.output)
    harness.scheduler.stop(item, FinishReason.CANCELLED)
    harness.scheduler.stop(item, FinishReason.CANCELLED)  # twice is once
    assert harness.schedule() is None
    assert harness.pool.usage == 0
    assert harness.commit() == []
    assert item.output == before
    assert item.finish_reason is FinishReason.CANCELLED


def test_cancel_between_steps_ends_at_once():
    harness = Harness(budget=16)
    harness.add(item := request(1, range(50), 5))
    harness.step()
    harness.scheduler.stop(item, FinishReason.CANCELLED)
    assert harness.pool.usage == 0
    assert harness.schedule() is None


def test_released_sequences_are_named_once_in_the_next_plan():
    harness = Harness()
    harness.add(request(1, [1], 1), request(2, [2], 2))
    harness.step()
    assert harness.plans[-1].released == ()
    harness.step()
    assert harness.plans[-1].released == (1,)
    assert len(harness.late.tables) == 1
    harness.add(request(3, [3], 2))
    harness.step()
    assert harness.plans[-1].released == (2,)
    harness.step()
    assert harness.plans[-1].released == ()


# --- random lives ----------------------------------------------------------------------------------------------------

SIZES = (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 67, 97)


def random_prompt(rng: random.Random) -> list[int]:
    document = rng.choice((0, 1, 2))
    shared = rng.choice((0, PAGE - 1, PAGE, 3 * PAGE, 61))
    own = rng.choice(SIZES)
    return [document * 1000 + i for i in range(shared)] + [rng.randrange(50) for _ in range(own)]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_random_lives(seed: int, num_stages: int):
    rng = random.Random(seed)
    page_size = rng.choice((1, 4, PAGE))
    harness = Harness(
        pages=rng.choice((180, 400)) * PAGE // page_size // 8,
        page_size=page_size, budget=rng.choice((1, 7, 16, 64, 500)),
        seqs=rng.choice((1, 2, 5, 16)),
        num_stages=num_stages,
    )  # fmt: skip
    waiting = [request(i, random_prompt(rng), rng.choice((1, 2, 7, 17))) for i in range(30)]
    depth = rng.choice((1, 2, 4))
    cancelled: set[int] = set()
    while True:
        while waiting and rng.random() < 0.5:
            harness.add(waiting.pop())
        if rng.random() < 0.05 and harness.requests:
            victim = harness.requests[rng.choice(sorted(harness.requests))]
            if victim.finish_reason is None:
                cancelled.add(victim.sequence)
                harness.scheduler.stop(victim, FinishReason.CANCELLED)
        if len(harness.in_flight) < depth and rng.random() < 0.7 and harness.schedule():
            continue
        if harness.in_flight:
            harness.commit()
        elif not waiting and harness.schedule() is None:
            break
    check_scheduler(harness.scheduler)
    assert harness.pool.usage == 0
    assert harness.count(Status.FINISHED) == len(harness.requests)
    check_prefixes(harness.scheduler._prefixes, [])  # nothing is pending
    for item in harness.requests.values():
        wanted = expected_output(item.prompt, item.stop.max_tokens)
        if item.sequence in cancelled and item.finish_reason is FinishReason.CANCELLED:
            assert item.output == wanted[: len(item.output)]
        else:
            assert item.output == wanted
            assert item.finish_reason is FinishReason.LENGTH
    assert all(plan.num_tokens <= harness.budget for plan in harness.plans)
    assert [plan.step for plan in harness.plans] == list(range(1, len(harness.plans) + 1))
    order = [part for plan in harness.plans for part in plan.slices]
    for sequence in harness.requests:
        parts = [part for part in order if part.sequence == sequence]
        assert all(a.start + a.length == b.start for a, b in pairwise(parts))
