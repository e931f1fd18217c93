"""Biases of single tokens as callers write them."""

from __future__ import annotations

import math

import pytest

from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs.limits import MAX_LOGIT_BIAS
from protos.jobs.logit_bias import TokenBias, read_logit_bias
from protos.jobs.sampling import AnswerOptions
from protos.jobs.validate import check_option, read_options


def test_mappings_and_pairs() -> None:
    wanted = (TokenBias(3, 100.0), TokenBias(50256, -100.0))
    for value in ({"50256": -100, 3: 100.0}, [(50256, -100), (3, 100)], wanted):
        assert read_logit_bias(value) == check_option("logit_bias", value) == wanted
        assert AnswerOptions(logit_bias=value).logit_bias == wanted  # type: ignore[arg-type]
    assert read_logit_bias({}) == read_logit_bias(()) == ()
    message = pb.Sampling(logit_bias=[pb.TokenBias(token_id=t, bias=b) for t, b in wanted])
    assert read_options(message).logit_bias == wanted


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"x": 1}, "'x': must be a token id"), ({-1: 1}, "'-1': must be a token id"),
        ({1 << 32: 1}, "'4294967296': must be a token id"), ({True: 1}, "'True': must be a token id"),
        ({1.0: 1}, "'1.0': must be a token id"), ({"\u0663": 1}, "must be a token id"),
        ({1: 100.1}, "'100.1': must be a number from -100 to 100"), ({1: math.nan}, "'nan': must be a number"),
        ({1: "5"}, "'5': must be a number"), ({1: None}, "'None': must be a number"), ({1: True}, "must be a number"),
        (5, "'5': must be a mapping of token ids to numbers"),
        ("ab", "must be a mapping"), ([1, 2], "must be a mapping"),
        (dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1), f"{MAX_LOGIT_BIAS + 1}: must be at most {MAX_LOGIT_BIAS}"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused(value: object, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^logit_bias: ") as caught:
        read_logit_bias(value)
    assert problem in str(caught.value)
