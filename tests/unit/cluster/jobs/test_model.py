"""Values of jobs: ids, inputs, what makes two submissions the same, and the way through JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from cluster.jobs.model import ACTIVE, FINAL, WAITING, InvalidJob, JobInput, JobSpec, JobState, check_id, new_id
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice
from protos.jobs.constraint import Constraint
from protos.jobs.sampling import AnswerOptions, Sampling
from protos.stage.messages import SamplingParams

DOC = new_id("doc")
OPTIONS = AnswerOptions(9, SamplingParams(0.5, seed=(1 << 63) - 1, logprobs=2), ("\n\n", "é"), (1, 2), True, False)


@pytest.mark.parametrize(
    ("value", "kind", "is_good"),
    [
        (new_id("job"), "job", True),
        (DOC, "doc", True),
        (DOC, "job", False),
        (DOC + "0", "doc", False),
        (DOC.upper(), "doc", False),
        (f"{DOC}\n", "doc", False),
        ("", "doc", False),
    ],
    ids=range(7),
)
def test_ids(value: str, kind: str, is_good: bool) -> None:
    if is_good:
        assert check_id(value, kind) == value
    else:
        with pytest.raises(InvalidJob, match=f"{kind} id: .*: must be {kind}_ and 32 hexadecimal digits"):
            check_id(value, kind)


def test_every_state_is_waiting_running_or_final() -> None:
    running = {JobState.PREFILLING, JobState.DECODING}
    assert WAITING | running == ACTIVE
    assert frozenset(JobState) == ACTIVE | FINAL
    assert {state for state in JobState if state.is_final} == FINAL


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prompt": "a", "token_ids": (1,)},
        {"document_id": DOC, "questions": ("q",), "messages": (ChatMessage("user", "hi"),)},
    ],
)
def test_an_input_is_exactly_one_thing(values: dict[str, object]) -> None:
    with pytest.raises(InvalidJob, match="must be exactly one of"):
        JobInput(**values)  # type: ignore[arg-type]


def test_an_answer_for_every_question() -> None:
    assert JobInput(document_id=DOC, questions=("q",) * 1024).num_answers == 1024
    assert JobInput(prompt="a").num_answers == 1


@pytest.mark.parametrize(
    "source",
    [
        JobInput(document_id=DOC, questions=("Who?", "Warum?")),
        JobInput(token_ids=(1, 2)),
        JobInput(token_ids=()),
        JobInput(messages=(ChatMessage("user", "hi"), ChatMessage("assistant", ""))),
        JobInput(messages=(
            ChatMessage("assistant", "", "hm", (ToolCall("c1", "f", '{"a": 1}'),)),
            ChatMessage("tool", "r", tool_call_id="c1", name="f"),
        ), tools=(Tool("f", "d", '{"type": "object"}', True), Tool("g")), tool_choice=ToolChoice("named", "g", True)),
        JobInput(prompt=""),
    ],
)  # fmt: skip
def test_a_spec_goes_through_json(source: JobInput) -> None:
    spec = JobSpec(source, OPTIONS, -3, 5.5, True, "key", {"team": "a'b", "ü": ""})
    constrained = replace(spec, ask=replace(OPTIONS, structured_outputs=Constraint("choice", '["é", "b"]')))
    for one in (spec, constrained):
        assert JobSpec.from_json(one.to_json()) == one
    assert spec.body_hash() != constrained.body_hash()


def test_messages_of_earlier_versions_are_read_and_have_the_same_hash() -> None:
    chat = JobInput(messages=(ChatMessage("user", "hi"), ChatMessage("assistant", "")))
    spec = JobSpec(chat, AnswerOptions(sampling=Sampling(seed=5)))
    values = json.loads(spec.to_json())
    values["input"]["messages"] = [["user", "hi"], ["assistant", ""]]
    del values["request"], values["prompt_logprobs"], values["cache_ttl_s"]
    for name in ("tools", "tool_choice"):
        del values["input"][name]
    assert JobSpec.from_json(json.dumps(values)) == spec
    del values["idempotency_key"], values["deadline"], values["cache_salt"], values["input"]["read"]
    for name in ("structured_outputs", "thinking_budget", "min_tokens", "logit_bias"):
        del values["ask"][name]
    del values["shorten"]
    values["ask"]["sampling"] = asdict(SamplingParams(seed=5))
    del values["ask"]["sampling"]["presence_penalty"], values["ask"]["sampling"]["frequency_penalty"]
    before = hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    assert spec.body_hash() == before


def test_tools_and_reasoning_make_another_submission() -> None:
    chat = JobInput(messages=(ChatMessage("assistant", "hi"),))
    sources = [
        chat, replace(chat, tools=(Tool("f"),)), replace(chat, tool_choice=ToolChoice("none")),
        replace(chat, tools=(Tool("f"),), tool_choice=ToolChoice("named", "f")),
        JobInput(messages=(ChatMessage("assistant", "hi", "hm"),)),
    ]  # fmt: skip
    assert len({JobSpec(source, OPTIONS).body_hash() for source in sources}) == len(sources)


def test_only_key_and_deadline_do_not_count_as_body() -> None:
    spec = JobSpec(JobInput(prompt="a"), OPTIONS, idempotency_key="key", deadline=1.0, labels={"a": "1", "b": "2"})
    same = [
        replace(spec, deadline=2.0), replace(spec, idempotency_key="other"), replace(spec, labels={"b": "2", "a": "1"}),
        replace(spec, cache_salt="alice"),
    ]  # fmt: skip
    assert {other.body_hash() for other in same} == {spec.body_hash()}
    others = [
        replace(spec, input=JobInput(prompt="b")), replace(spec, ask=replace(OPTIONS, max_tokens=8)),
        replace(spec, priority=1), replace(spec, attached=True), replace(spec, labels={}),
        replace(spec, request="{}"),
    ]  # fmt: skip
    assert len({spec.body_hash(), *(other.body_hash() for other in others)}) == 1 + len(others)


def test_what_is_not_said_makes_the_same_submission_as_before_and_another_one_than_saying_it() -> None:
    """The hash of a request that says nothing of sampling is the one that a head without defaults of models stored."""
    spec = JobSpec(JobInput(prompt="a"), AnswerOptions(sampling=Sampling(seed=5)))
    greedy = JobSpec(JobInput(prompt="a"), AnswerOptions(sampling=SamplingParams(seed=5)))
    values = json.loads(greedy.to_json())
    del values["idempotency_key"], values["deadline"], values["cache_salt"]
    for name in ("read", "tools", "tool_choice"):
        del values["input"][name]
    for name in ("structured_outputs", "thinking_budget", "min_tokens", "logit_bias"):
        del values["ask"][name]
    del values["ask"]["sampling"]["presence_penalty"], values["ask"]["sampling"]["frequency_penalty"]
    del values["shorten"], values["request"], values["prompt_logprobs"], values["cache_ttl_s"]
    before = hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    assert spec.body_hash() == before
    others = [replace(spec, ask=AnswerOptions(sampling=Sampling(seed=5, **said))) for said in (
        {"temperature": 0.0}, {"top_p": 1.0}, {"temperature": 0.5}, {"top_k": 5},
    )]  # fmt: skip
    assert len({other.body_hash() for other in (spec, greedy, *others)}) == 6


def test_later_options_make_another_submission_and_their_absence_the_same_as_before() -> None:
    spec = JobSpec(JobInput(prompt="p"), AnswerOptions(sampling=Sampling(seed=1)))
    asks: list[dict[str, Any]] = [
        {"thinking_budget": 0}, {"min_tokens": 1}, {"logit_bias": {3: 1.0}},
        {"sampling": Sampling(seed=1, presence_penalty=0.0)}, {"sampling": Sampling(seed=1, frequency_penalty=1.0)},
    ]  # fmt: skip
    others = [replace(spec, ask=replace(spec.ask, **values)) for values in asks]
    others += [replace(spec, cache_ttl_s=300)]
    assert len({spec.body_hash(), *(other.body_hash() for other in others)}) == 1 + len(others)
    for other in others:
        assert JobSpec.from_json(other.to_json()) == other


def test_what_an_answer_was_shortened_to_is_not_part_of_the_submission() -> None:
    """A repeated submission is the same one, though the store has the length that fitted."""
    asked = JobSpec(JobInput(prompt="a"), AnswerOptions(max_tokens=32768), shorten=True)
    stored = replace(asked, ask=replace(asked.ask, max_tokens=17))
    assert asked.body_hash() == stored.body_hash()
    assert asked.body_hash() != replace(asked, shorten=False).body_hash()
    assert JobSpec.from_json(stored.to_json()) == stored
