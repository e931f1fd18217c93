"""Steps planned before the token they continue is known."""

import pytest

from cluster.request import FinishReason, Status
from tests.support.scheduler_bench import PAGE, Bench, expected_output, request


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_running_ahead_gives_the_same_tokens_and_no_step_more(depth: int, max_tokens: int):
    bench = Bench(runs_ahead=True)
    bench.add(item := request(1, range(PAGE + 3), max_tokens))
    while True:
        while len(bench.in_flight) < depth and bench.schedule():
            pass
        if not bench.in_flight:
            break
        bench.commit()
    assert item.output == expected_output(item.prompt, max_tokens)
    assert len(bench.plans) == max_tokens
    blind = [part.token_ids for plan in bench.plans[1:] for part in plan.slices if not part.token_ids]
    assert len(blind) == (0 if depth == 1 else max_tokens - 1), "with one in flight every token is known"


def test_an_end_wastes_the_step_in_flight_and_others_get_its_blocks():
    prompt = list(range(20))
    third = expected_output(prompt, 3)[2]
    bench = Bench(blocks=3, runs_ahead=True)
    bench.add(item := request(1, prompt, 20, [third]), heir := request(2, [8] * 30, 9))
    for _ in range(3):
        bench.schedule()
    bench.schedule()
    for _ in range(3):
        bench.commit()
    assert item.output == expected_output(prompt, 3)
    assert item.finish_reason is FinishReason.STOP
    assert bench.schedule() is not None, "the heir begins behind the step that is wasted"
    assert heir.status is Status.RUNNING
    assert bench.commit() == []
    bench.commit()
    bench.run()
    assert heir.output == expected_output(heir.prompt, 9)
