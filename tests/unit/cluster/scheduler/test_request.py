"""The tokens of a request, how many are left, and when it ends."""

from __future__ import annotations

from array import array

import pytest

from cluster.scheduler.request import FinishReason, Request, StopRules
from protos.stage.messages import SampledToken, SamplingParams


def request(prompt_len: int, output: int = 0, max_tokens: int = 10, stops: tuple[int, ...] = ()) -> Request:
    item = Request(7, array("I", range(prompt_len)), SamplingParams(), StopRules(max_tokens, frozenset(stops)))
    for index in range(output):
        item.accept(SampledToken(7, 100 + index))
    return item


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("stop", range(7))
def test_tokens_are_prompt_and_output_as_one_sequence(start: int, stop: int) -> None:
    assert request(3, 3).tokens(start, max(start, stop)) == [0, 1, 2, 100, 101, 102][start : max(start, stop)]


def test_remaining_counts_what_is_not_scheduled() -> None:
    item = request(5)
    assert (item.num_prompt, item.num_tokens, item.remaining) == (5, 5, 5)
    item.num_scheduled = 5
    assert item.remaining == 0
    item.accept(SampledToken(7, 9))
    assert (item.num_tokens, item.remaining) == (6, 1)


@pytest.mark.parametrize(
    ("output", "max_tokens", "stops", "reason"),
    [
        (1, 2, (), None),
        (2, 2, (), FinishReason.LENGTH),
        (1, 2, (100,), FinishReason.STOP),
        (2, 2, (101,), FinishReason.STOP),  # a stop id counts before the length
        (2, 3, (5,), None),
    ],
)
def test_accept_ends_generation(
    output: int, max_tokens: int, stops: tuple[int, ...], reason: FinishReason | None
) -> None:
    item = request(1, output, max_tokens, stops)
    assert item.finish_reason is reason
    assert item.output == [sample.token_id for sample in item.samples] == [100, 101][:output]


def test_requests_are_compared_by_identity() -> None:
    assert request(1) != request(1)
