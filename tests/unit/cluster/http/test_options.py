"""Options that all protocols share."""

from __future__ import annotations

import pytest

from cluster.http.core.errors import ApiError
from cluster.http.options import AnswerFields, answer_options, check_supported, first_set, job_fields
from protos.errors import InvalidRequest


def test_what_is_left_out_stays_with_the_model() -> None:
    options = answer_options(AnswerFields(), None, None, None, 77)
    assert options.max_tokens == 77
    assert options.sampling.temperature is None
    assert options.stop == ()


def test_an_empty_stop_is_none() -> None:
    assert answer_options(AnswerFields(stop=""), None, None, None, 1).stop == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_numbers_out_of_range(value: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^temperature: "):
        answer_options(AnswerFields(temperature=value), None, None, None, 1)


def test_values_that_change_nothing_are_taken() -> None:
    check_supported(AnswerFields(n=1, min_tokens=0, logit_bias={}, presence_penalty=0.0, use_beam_search=False))
    with pytest.raises(ApiError, match=r"^use_beam_search: True: "):
        check_supported(AnswerFields(use_beam_search=True))


def test_low_priorities_go_first_as_in_vllm() -> None:
    assert job_fields(AnswerFields(priority=3))["priority"] == -3
    assert job_fields(AnswerFields())["priority"] == 0


def test_first_set() -> None:
    assert first_set([None, 0, 1]) == 0
    assert first_set([None]) is None
