"""The scheduler: cases by hand, and random lives of many requests against stages that check every slot they read."""

import random
from itertools import pairwise

import pytest

from cluster.scheduler.request import FinishReason, Status
from cluster.scheduler.scheduler import DoesNotFit
from tests.support.rigs.scheduler import PAGE, Bench, expected_output, request

# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 63, 64, 65, 193])
@pytest.mark.parametrize("budget", [1, 17, 64])
def test_chunks_cover_the_prompt_once(size: int, budget: int):
    bench = Bench(budget=budget)
    item = request(1, range(size), 4)
    bench.add(item)
    bench.run()
    parts = [plan.slices[0] for plan in bench.plans]
    assert [part.start for part in parts] == [0, *(part.start + part.length for part in parts[:-1])]
    assert all(part.length <= budget for part in parts)
    prefill = [part for part in parts if part.start < size]
    assert len(prefill) == -(-size // budget)
    assert [part.sample is not None for part in prefill] == [False] * (len(prefill) - 1) + [True]
    assert item.output == expected_output(range(size), 4)
    assert item.finish_reason is FinishReason.LENGTH
    assert [part.sample.token_index for part in parts if part.sample] == [0, 1, 2, 3]
    assert bench.pool.usage == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "pages"), [(16, 1, 1), (16, 2, 2), (17, 1, 2), (1, 16, 1), (1, 17, 2)]
)
def test_pages_for_the_prompt_and_every_token_fed_back(prompt: int, max_tokens: int, pages: int):
    bench = Bench(pages=pages)
    item = request(1, range(prompt), max_tokens)
    assert bench.scheduler.pages_needed(item) == pages
    bench.add(item)
    bench.run()
    assert len(item.output) == max_tokens
    assert bench.plans[-1].slices[0].num_pages == pages, "the last page is used"


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = Bench(pages=2).scheduler
    scheduler.prepare(request(1, range(30), 3))
    with pytest.raises(DoesNotFit, match=r"prompt of 31 tokens with max_tokens 3: .* holds 32 tokens; at most 30 "):
        scheduler.prepare(request(1, range(31), 3))
    with pytest.raises(DoesNotFit, match="at most 0 prompt tokens"):
        scheduler.prepare(request(1, [1], 34))


def test_stop_ids_end_a_request():
    prompt = list(range(20))
    third = expected_output(prompt, 3)[2]
    bench = Bench()
    item = request(1, prompt, 10, [third])
    bench.add(item)
    bench.run()
    assert item.output[-1] == third
    assert len(item.output) == 3
    assert item.finish_reason is FinishReason.STOP


def test_short_prompts_ride_along_with_a_long_one():
    bench = Bench(pages=200, budget=32)
    long, short = request(1, range(1000), 1), request(2, range(2000, 2020), 3)
    bench.add(long)
    bench.step()
    bench.add(short)
    steps = 0
    while short.finish_reason is None:
        bench.step()
        steps += 1
    assert steps == 2 + 2  # 16 + 4 tokens, then two decode steps
    assert long.num_computed == 32 + 16 + 16 + 31 + 31  # a step that others share stays short
    bench.run()
    assert long.output == expected_output(range(1000), 1)


def test_penalised_requests_bring_their_history_once():
    bench = Bench()
    bench.add(request(1, [5, 3, 5], 3, repetition_penalty=1.2), request(2, [4], 2))
    bench.run()
    of_first = [part.sample for plan in bench.plans for part in plan.slices if part.sequence == 1]
    assert [sample.history for sample in of_first] == [[3, 5], None, None]
    assert all(p.sample.history is None for plan in bench.plans for p in plan.slices if p.sequence == 2)


# --- admission -------------------------------------------------------------------------------------------------------


def test_without_room_requests_wait_in_order():
    bench = Bench(pages=4)
    first, second, third = request(1, range(40), 2), request(2, range(100, 140), 2), request(3, [1], 1)
    bench.add(first, second, third)
    bench.step()
    assert [r.status for r in (first, second, third)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    assert second.pages == ()
    bench.run()
    assert all(r.output == expected_output(r.prompt, r.stop.max_tokens) for r in (first, second, third))
    starts = [part.sequence for plan in bench.plans for part in plan.slices if part.start == 0]
    assert starts == [1, 2, 3], "nobody overtakes"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_than_max_num_seqs_run(limit: int):
    bench = Bench(seqs=limit)
    bench.add(*(request(i, [i] * (i + 1), 4) for i in range(6)))
    while bench.schedule():
        assert bench.count(Status.RUNNING) <= limit
        assert len(bench.in_flight[-1].slices) <= limit
        bench.commit()
    assert all(r.finish_reason is FinishReason.LENGTH for r in bench.requests.values())


# --- shared prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 64, 67])
def test_a_second_question_adopts_full_pages(size: int):
    document = list(range(1000, 1000 + size))
    bench = Bench()
    bench.add(request(1, [*document, 1]))
    bench.run()
    again = request(2, [*document, 2])
    bench.add(again)
    bench.run()
    assert again.num_cached == size // PAGE * PAGE
    assert again.output == expected_output(again.prompt, 3)


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 2 * PAGE])
def test_the_same_prompt_again_computes_at_least_one_token(size: int):
    bench = Bench()
    bench.add(request(1, range(size)))
    bench.run()
    again = request(2, range(size))
    bench.add(again)
    bench.run()
    assert again.num_cached == (size - 1) // PAGE * PAGE
    assert again.output == expected_output(range(size), 3)


def test_followers_wait_for_the_leader_and_adopt():
    document = list(range(500, 564))  # four pages
    bench = Bench(budget=32)
    leader, *followers = (request(i, [*document, i], 2) for i in range(1, 5))
    bench.add(leader, *followers)
    bench.step()
    assert all(f.status is Status.WAITING for f in followers)
    bench.step()
    bench.step()
    assert all(f.status is Status.RUNNING for f in followers)
    assert all(f.num_cached == 64 for f in followers)
    bench.run()
    assert all(r.output == expected_output(r.prompt, 2) for r in (leader, *followers))
    computed = sum(part.length for plan in bench.plans for part in plan.slices)
    assert computed == 64 + 4 + 4, "the document was computed once"


def test_a_follower_that_shares_only_the_beginning_starts_early():
    bench = Bench(budget=16)
    leader = request(1, range(160), 1)
    follower = request(2, [*range(32), 9, 9, 9], 1)
    bench.add(leader, follower)
    for _ in range(2):
        bench.step()
        assert follower.status is Status.WAITING
    bench.step()
    assert follower.num_cached == 32
    bench.run()
    assert follower.output == expected_output(follower.prompt, 1)


def test_others_pass_a_waiting_follower():
    bench = Bench(budget=16)
    bench.add(request(1, range(100), 1), request(2, range(100), 1), other := request(3, [7], 1))
    bench.step()
    bench.step()
    assert other.status is not Status.WAITING


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_a_follower_takes_over_from_a_cancelled_leader(in_flight: int):
    document = list(range(80))
    bench = Bench(budget=16)
    leader, follower, last = (request(i, [*document, i], 2) for i in (1, 2, 3))
    bench.add(leader, follower, last)
    bench.step()
    for _ in range(in_flight):
        bench.schedule()
    bench.scheduler.stop(leader, FinishReason.CANCELLED)
    assert leader.finish_reason is FinishReason.CANCELLED
    bench.schedule()
    assert follower.num_cached == PAGE, "what the leader had finished is kept"
    while bench.in_flight:
        bench.commit()
    assert last.status is Status.WAITING
    bench.run()
    assert follower.output == expected_output(follower.prompt, 2)
    assert last.num_cached == 80
    bench.scheduler.check_integrity()


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancel_while_waiting():
    bench = Bench(seqs=1)
    bench.add(request(1, [1]), waiting := request(2, [2]))
    bench.step()
    bench.scheduler.stop(waiting, FinishReason.CANCELLED)
    assert waiting.finish_reason is FinishReason.CANCELLED
    bench.run()
    assert waiting.output == []
    assert not any(2 in plan.released for plan in bench.plans), "the stages never knew it"


def test_cancel_with_a_sampling_step_in_flight_drops_the_token():
    bench = Bench()
    bench.add(item := request(1, range(20), 5))
    bench.step()
    bench.schedule()
    before = list(item.output)
    bench.scheduler.stop(item, FinishReason.CANCELLED)
    bench.scheduler.stop(item, FinishReason.CANCELLED)  # twice is once
    assert bench.schedule() is None
    assert bench.pool.usage == 0
    assert bench.commit() == []
    assert item.output == before
    assert item.finish_reason is FinishReason.CANCELLED


def test_cancel_between_steps_ends_at_once():
    bench = Bench(budget=16)
    bench.add(item := request(1, range(50), 5))
    bench.step()
    bench.scheduler.stop(item, FinishReason.CANCELLED)
    assert bench.pool.usage == 0
    assert bench.schedule() is None


def test_released_sequences_are_named_once_in_the_next_plan():
    bench = Bench()
    bench.add(request(1, [1], 1), request(2, [2], 2))
    bench.step()
    assert bench.plans[-1].released == ()
    bench.step()
    assert bench.plans[-1].released == (1,)
    assert len(bench.late.tables) == 1
    bench.add(request(3, [3], 2))
    bench.step()
    assert bench.plans[-1].released == (2,)
    bench.step()
    assert bench.plans[-1].released == ()


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
    bench = Bench(
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
            bench.add(waiting.pop())
        if rng.random() < 0.05 and bench.requests:
            victim = bench.requests[rng.choice(sorted(bench.requests))]
            if victim.finish_reason is None:
                cancelled.add(victim.sequence)
                bench.scheduler.stop(victim, FinishReason.CANCELLED)
        if len(bench.in_flight) < depth and rng.random() < 0.7 and bench.schedule():
            continue
        if bench.in_flight:
            bench.commit()
        elif not waiting and bench.schedule() is None:
            break
    bench.scheduler.check_integrity()
    assert bench.pool.usage == 0
    assert (bench.count(Status.RUNNING), bench.count(Status.WAITING)) == (0, 0)
    assert bench.scheduler._pending == {}
    for item in bench.requests.values():
        wanted = expected_output(item.prompt, item.stop.max_tokens)
        if item.sequence in cancelled and item.finish_reason is FinishReason.CANCELLED:
            assert item.output == wanted[: len(item.output)]
        else:
            assert item.output == wanted
            assert item.finish_reason is FinishReason.LENGTH
    assert all(plan.num_tokens <= bench.budget for plan in bench.plans)
    assert [plan.step for plan in bench.plans] == list(range(1, len(bench.plans) + 1))
    order = [part for plan in bench.plans for part in plan.slices]
    for sequence in bench.requests:
        parts = [part for part in order if part.sequence == sequence]
        assert all(a.start + a.length == b.start for a, b in pairwise(parts))
