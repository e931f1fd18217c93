"""Checks of values as callers hand them over, and of whole messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import UserError
from protos.jobs import jobs_pb2 as pb
from protos.jobs import limits, validate
from protos.jobs.constraint import Constraint
from protos.jobs.sampling import OPTIONS, AnswerOptions, SamplingParams


class Unprintable:
    def __repr__(self) -> str:
        return "a\nb" + "c" * 100


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (5, "5"), ("a\nb", r"'a\nb'"), ("x" * 61, f"'{'x' * 60}'"), (10**5000, "(int)"), (None, "None"),
        (Unprintable(), f"a b{'c' * 57}..."), (b"\xff", r"b'\xff'"),
    ],
    ids=range(7),
)  # fmt: skip
def test_values_are_shown_on_one_short_line(value: object, shown: str) -> None:
    assert validate.show(value) == shown


GOOD: list[tuple[Callable[[], object], object]] = [
    (lambda: validate.check_integer("k", np.int64(3), 0, 3), 3),
    (lambda: validate.check_number("k", np.float32(0.5), 0, 1), 0.5),
    (lambda: validate.check_number("k", 1, 0, 1), 1.0),
    (lambda: validate.check_flag("k", False), False),
    (lambda: validate.check_text("k", "ü" * 3, 3, 3), "üüü"),
    (lambda: validate.check_texts("k", "one"), ["one"]),
    (lambda: validate.check_texts("k", ("a", "")), ["a", ""]),
    (lambda: validate.check_token_ids("k", np.arange(3)), [0, 1, 2]),
    (lambda: validate.check_token_ids("k", range(2)), [0, 1]),
    (lambda: validate.check_labels({"a": ""}), {"a": ""}),
    (lambda: validate.check_option("stop", ""), []),
    (lambda: validate.check_option("stop_token_ids", (1, 2)), [1, 2]),
    (lambda: validate.check_option("max_tokens", limits.MAX_UINT32), limits.MAX_UINT32),
    (lambda: validate.check_option("enable_thinking", False), False),
    (lambda: validate.check_option("top_p", 1), 1.0),
]


@pytest.mark.parametrize(("check", "value"), GOOD, ids=range(len(GOOD)))
def test_good_values_become_plain_ones(check: Callable[[], object], value: object) -> None:
    checked = check()
    assert checked == value
    assert type(checked) is type(value)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: validate.check_count("k", 3, 2), "k: 3: must be at most 2"),
    (lambda: validate.check_integer("k", True, 0, 9), "k: True: must be a whole number from 0 to 9"),
    (lambda: validate.check_integer("k", 1.0, 0, 9), "k: 1.0: must be a whole number from 0 to 9"),
    (lambda: validate.check_integer("k", 10, 0, 9), "k: 10: must be a whole number from 0 to 9"),
    (lambda: validate.check_number("k", "1", 0, 9), "k: '1': must be a number from 0 to 9"),
    (lambda: validate.check_number("k", math.nan, 0, 9), "k: nan: must be a number from 0 to 9"),
    (lambda: validate.check_number("k", 10**400, 0, 9), "k: 1" + "0" * 59 + "...: must be a number from 0 to 9"),
    (lambda: validate.check_number("k", 0, 0, 9e6, above=True), "k: 0: must be a number above 0 and at most 9e+06"),
    (lambda: validate.check_number("k", 9.5, 0, 9, unit=" of x"), "k: 9.5: must be a number of x from 0 to 9"),
    (lambda: validate.check_flag("k", 0), "k: 0: must be True or False"),
    (lambda: validate.check_text("k", b"a"), "k: b'a': must be text"),
    (lambda: validate.check_text("k", "a\ud800"), r"k: character '\ud800' at 1: must be text that UTF-8 can hold"),
    (lambda: validate.check_text("k", "ab", 1), "k: 2 characters: must have 0 to 1 characters"),
    (lambda: validate.check_text("k", "", min_chars=1), "k: 0 characters: must have at least 1"),
    (lambda: validate.check_texts("k", b"ab"), "k: b'ab': must be a list of texts"),
    (lambda: validate.check_texts("k", ["a", 1]), "k[1]: 1: must be text"),
    (lambda: validate.check_token_ids("k", "12"), "k: '12': must be a list of whole numbers"),
    (lambda: validate.check_token_ids("k", 7), "k: 7: must be a list of whole numbers"),
    (lambda: validate.check_token_ids("k", [None]), "k[0]: None: must be a whole number from 0 to 4294967295"),
    (lambda: validate.check_labels([]), "labels: []: must be a mapping of text to text"),
    (lambda: validate.check_labels({1: "a"}), "labels: 1: must be text"),
    (lambda: validate.check_labels({"a": "b" * 257}), "labels.'a': 257 characters: must have 0 to 256 characters"),
    (lambda: validate.check_option("stop", 5), "stop: 5: must be a list of texts"),
    (lambda: validate.check_option("seed", 1 << 63), "seed: 9223372036854775808: must be a whole number from 0 to "
     "9223372036854775807"),
    (lambda: validate.check_option("max_tokens", 0), "max_tokens: 0: must be a whole number from 1 to 4294967295"),
    (lambda: validate.check_option("min_p", 1.5), "min_p: 1.5: must be a number from 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "said"), BAD, ids=range(len(BAD)))
def test_bad_values_are_named_with_what_is_allowed(check: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check()
    assert str(caught.value) == said


def test_a_submission_is_read_with_its_options() -> None:
    fields = {
        "max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5,
        "seed": 0, "logprobs": 0, "stop": ["x"], "stop_token_ids": [5], "ignore_eos": True, "enable_thinking": False,
        "structured_outputs": pb.StructuredOutputs(kind="regex", text="a+"), "thinking_budget": 0, "min_tokens": 3,
        "presence_penalty": 0.5, "frequency_penalty": -2.0, "logit_bias": [pb.TokenBias(token_id=4, bias=-100)],
    }  # fmt: skip
    assert list(fields) == [item.name for item in pb.Sampling.DESCRIPTOR.fields]
    assert fields.keys() == OPTIONS.keys()
    options = validate.check_submit(pb.SubmitRequest(sampling=pb.Sampling(**fields)))
    params = SamplingParams(0.5, 3, 0.9, 0.1, 1.5, 0, 0, 0.5, -2.0)
    assert options == AnswerOptions(7, params, ("x",), (5,), True, False, Constraint("regex", "a+"), 0, 3, {4: -100})  # type: ignore[arg-type]
    assert validate.check_submit(pb.SubmitRequest()) == AnswerOptions()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampling": pb.Sampling(stop=[""])}, "stop: 0 characters: must have 1 to 256 characters"),
        ({"sampling": pb.Sampling(top_p=0.0)}, "top_p: 0: must be above 0 and at most 1"),
        (
            {"sampling": pb.Sampling(structured_outputs=pb.StructuredOutputs())},
            "structured_outputs.kind: '': must be one of json_schema, json_object, regex, choice, grammar",
        ),
        ({"deadline_s": math.inf}, "deadline_s: inf: must be a number of seconds above 0 and at most 2592000"),
        ({"idempotency_key": "k" * 257}, "idempotency_key: 257 characters: must have 0 to 256 characters"),
        ({"labels": {str(n): "" for n in range(33)}}, "labels: 33: must be at most 32"),
        ({"document": pb.DocumentQuestions(questions=["q"] * 1025)}, "document.questions: 1025: must be at most 1024"),
        ({"chat": pb.Chat(messages=[pb.Message()] * 4097)}, "chat.messages: 4097: must be at most 4096"),
    ],
)
def test_submissions_outside_the_limits(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate.check_submit(pb.SubmitRequest(**fields))
    assert str(caught.value) == said


@given(st.sampled_from(sorted(OPTIONS)), st.one_of(st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_what_a_client_lets_through_its_message_can_hold(name: str, value: object) -> None:
    message = name
    try:
        pb.Sampling(**{name: validate.check_option(name, value)})
    except UserError as error:
        message = str(error)
    assert message.startswith(name)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (pb.DocumentHeader(name="n", source_hash="0a" * 32), ""),
        (pb.DocumentHeader(name="n" * 257), "name: 257 characters"),
        (pb.DocumentHeader(source_hash="0A" * 32), "source_hash: .* must be 64 hexadecimal digits, or empty"),
        (pb.DocumentHeader(source_hash="0a"), "source_hash: "),
    ],
)
def test_headers_of_documents(header: pb.DocumentHeader, said: str) -> None:
    if not said:
        assert validate.check_header(header) is header
    else:
        with pytest.raises(UserError, match=said):
            validate.check_header(header)
