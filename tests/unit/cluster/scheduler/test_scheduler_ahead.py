"""Steps planned before the token they continue is known."""

import pytest

from cluster.scheduler.request import FinishReason, Status
from protos.stage.messages import StepPlan
from tests.support.rigs.scheduler import PAGE, Harness, expected_output, request


def drain(harness: Harness, depth: int) -> None:
    """Go on with so many steps in flight until nothing is left."""
    while True:
        while len(harness.in_flight) < depth and harness.schedule():
            pass
        if not harness.in_flight:
            return
        harness.commit()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_running_ahead_gives_the_same_tokens_and_no_step_more(depth: int, max_tokens: int):
    harness = Harness()
    harness.add(item := request(1, range(PAGE + 3), max_tokens))
    drain(harness, depth)
    assert item.output == expected_output(item.prompt, max_tokens)
    assert len(harness.plans) == max_tokens
    blind = [part.token_ids for plan in harness.plans[1:] for part in plan.slices if not part.token_ids]
    assert len(blind) == (0 if depth == 1 else max_tokens - 1), "with one in flight every token is known"


def test_an_end_wastes_the_step_in_flight_and_others_get_its_pages():
    prompt = list(range(20))
    third = expected_output(prompt, 3)[2]
    harness = Harness(pages=3)
    harness.add(item := request(1, prompt, 20, [third]), heir := request(2, [8] * 30, 9))
    for _ in range(3):
        harness.schedule()
    harness.schedule()
    for _ in range(3):
        harness.commit()
    assert item.output == expected_output(prompt, 3)
    assert item.finish_reason is FinishReason.STOP
    assert harness.schedule() is not None, "the heir begins behind the step that is wasted"
    assert heir.status is Status.RUNNING
    assert harness.commit() == []
    harness.commit()
    harness.run()
    assert heir.output == expected_output(heir.prompt, 9)


# --- several stages --------------------------------------------------------------------------------------------------


def sequences(plan: StepPlan) -> list[int]:
    return [part.sequence for part in plan.slices]


def decoding(num_stages: int, count: int, max_tokens: int = 9) -> Harness:
    """A harness whose requests are all in the prompt step, which is in flight."""
    harness = Harness(pages=400, budget=500, num_stages=num_stages)
    harness.add(*(request(number, [number] * 5, max_tokens) for number in range(1, count + 1)))
    assert sequences(harness.schedule()) == list(range(1, count + 1))
    return harness


@pytest.mark.parametrize(("stages", "alone"), [(1, 2), (2, 3), (5, 6)])
def test_a_prompt_alone_in_a_pipeline_has_one_step_more_in_flight(stages: int, alone: int):
    harness = Harness(pages=400, budget=16, num_stages=stages)
    usual = max(2, stages)
    assert harness.scheduler.depth == usual
    harness.add(request(1, range(100)))
    assert harness.scheduler.depth == usual, "it waits"
    harness.schedule()
    assert harness.scheduler.depth == alone
    harness.add(request(2, [7] * 100))
    assert harness.scheduler.depth == usual, "another one would wait for the step"
    harness.schedule()
    assert harness.scheduler.depth == usual
    harness.run()
    assert harness.scheduler.depth == usual


def test_a_request_that_decodes_alone_has_a_step_a_stage_in_flight():
    assert decoding(3, 1).scheduler.depth == 3


@pytest.mark.parametrize(
    ("stages", "count", "groups"),
    [
        (1, 1, [[1]]), (2, 1, [[1]]), (5, 1, [[1]]), (1, 3, [[1, 2, 3]]), (2, 2, [[1], [2]]), (2, 3, [[1, 2], [3]]),
        (2, 4, [[1, 2], [3, 4]]), (3, 4, [[1, 2], [3, 4]]), (3, 3, [[1], [2], [3]]), (4, 2, [[1], [2]]),
    ],
)  # fmt: skip
def test_decoding_sequences_take_turns_in_as_many_groups_as_stages(stages: int, count: int, groups: list[list[int]]):
    harness = decoding(stages, count)
    harness.commit()
    for step in range(8):
        assert sequences(harness.schedule()) == groups[step % len(groups)]
        if step >= 5:
            harness.commit()
    drain(harness, 1)
    assert [item.output for item in harness.requests.values()] == [
        expected_output([n] * 5, 9) for n in harness.requests
    ]


@pytest.mark.parametrize("stages", [2, 3])
def test_several_stages_do_not_run_ahead_beside_a_prompt(stages: int):
    harness = Harness(pages=400, budget=16, num_stages=stages)
    harness.add(short := request(1, [1] * 5, 9), request(2, [2] * 60, 9))
    assert sequences(harness.schedule()) == [1, 2]
    assert sequences(harness.schedule()) == [2], "a chunk does not wait for the token of another sequence"
    harness.commit()
    plan = harness.schedule()
    assert sequences(plan) == [1, 2]
    assert list(plan.slices[0].token_ids) == short.output
    drain(harness, 2)
    for item in harness.requests.values():
        assert item.output == expected_output(item.prompt, 9)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("lengths", [[1], [7], [3, 9], [1, 2, 9], [4, 4, 4, 12, 1]])
def test_several_stages_take_no_step_for_nothing(depth: int, lengths: list[int]):
    harness = Harness(pages=400, budget=500, num_stages=2)
    harness.add(*(request(number, [number] * 5, length) for number, length in enumerate(lengths, 1)))
    drain(harness, depth)
    for item in harness.requests.values():
        assert item.output == expected_output(item.prompt, item.stop.max_tokens)
    assert sum(len(plan.slices) for plan in harness.plans) == sum(lengths)


def test_an_end_among_several_leaves_the_others_their_turns():
    third = expected_output([1] * 5, 3)[2]
    harness = Harness(pages=400, budget=500, num_stages=2)
    harness.add(request(1, [1] * 5, 20, [third]), request(2, [2] * 5, 12))
    for _ in range(2):
        harness.schedule()
        harness.commit()
    drain(harness, 5)
    first, second = harness.requests.values()
    assert (first.output, first.finish_reason) == (expected_output([1] * 5, 3), FinishReason.STOP)
    assert second.output == expected_output([2] * 5, 12)
