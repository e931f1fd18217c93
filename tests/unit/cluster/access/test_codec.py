"""Requests are read strictly, answers carry everything that is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.access import codec
from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import (
    DocumentRecord,
    JobAnswer,
    JobInput,
    JobRecord,
    JobSpec,
    JobState,
    new_id,
)
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs import limits
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice
from protos.jobs.logit_bias import TokenBias
from protos.jobs.sampling import AnswerOptions, Sampling
from protos.stage.messages import SamplingParams

DOC = new_id("doc")
NOW = 1000.0
DEADLINE_RULE = "must be a number of seconds above 0 and at most 2592000"


def decode(**fields: Any) -> JobSpec:
    return codec.decode_submit(pb.SubmitRequest(**fields), NOW, lambda text: DOC)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", "sampling": pb.Sampling(**fields)}


def document(**fields: Any) -> dict[str, Any]:
    return {"document": pb.DocumentQuestions(**fields)}


def test_a_document_is_read_with_low_priority_and_one_token() -> None:
    spec = decode(**document(document_id=DOC, read=True))
    assert (spec.input, spec.priority, spec.ask.max_tokens) == (JobInput(DOC, read=True), -1, 1)
    assert decode(**document(document_id=DOC, read=True), priority=3).priority == 3
    assert JobSpec.from_json(spec.to_json()) == spec
    with pytest.raises(InvalidRequest, match=r"document.questions: 1: must be none with document.read"):
        decode(**document(document_id=DOC, read=True, questions=["q"]))
    answer = JobAnswer(0, 7, 3, "length", "said", "thought")
    token = OutputToken(1, 0, 5, "said", answer="said")
    record = JobRecord(new_id("job"), JobState.SUCCEEDED, spec, 1.0, answers=(answer,))
    job = codec.encode_job(record, [token])
    shown = job.answers[0]
    assert (job.read, shown.text, list(shown.token_ids), shown.prompt_tokens) == (True, "", [], 7)
    assert not shown.HasField("reasoning")


def test_a_document_shows_what_is_stored_of_it() -> None:
    record = DocumentRecord(DOC, "d", 9, 1.0, 0.0, tokens=600, scale_len=-1, pinned=True, parent="p", seams=(3,))
    shown = codec.encode_document(record, 512, 77)
    assert (shown.tokens, shown.scale_len, shown.stored_tokens, shown.stored_bytes) == (600, 0, 512, 77)
    assert (shown.pinned, shown.expires, shown.parent) == (True, 0.0, "p")


def test_everything_that_was_asked_arrives() -> None:
    fields = {
        "max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5,
        "seed": (1 << 63) - 1, "logprobs": 0, "stop": ["x"], "stop_token_ids": [5], "ignore_eos": True,
        "enable_thinking": False, "presence_penalty": 1.0, "frequency_penalty": -1.0, "thinking_budget": 8,
        "min_tokens": 2, "logit_bias": [pb.TokenBias(token_id=3, bias=-2.5)],
    }  # fmt: skip
    spec = decode(
        **document(text="t", questions=["a", "b"]), sampling=pb.Sampling(**fields), priority=-3, deadline_s=5.0,
        attached=True, idempotency_key="k", labels={"team": ""},
    )  # fmt: skip
    params = SamplingParams(0.5, 3, 0.9, 0.1, 1.5, (1 << 63) - 1, 0, 1.0, -1.0)
    assert spec.ask == AnswerOptions(7, params, ("x",), (5,), True, False, None, 8, 2, (TokenBias(3, -2.5),))
    assert spec.input == JobInput(document_id=DOC, questions=("a", "b"))
    assert (spec.priority, spec.deadline, spec.attached, spec.idempotency_key) == (-3, NOW + 5, True, "k")
    assert spec.labels == {"team": ""}
    assert JobSpec.from_json(spec.to_json()) == spec


def test_what_is_absent_keeps_its_default() -> None:
    sampling = pb.Sampling(seed=0)
    assert decode(prompt="a", sampling=sampling) == JobSpec(
        JobInput(prompt="a"), AnswerOptions(sampling=Sampling(seed=0))
    )


def test_a_seed_nobody_asked_for_is_another_one_for_every_job() -> None:
    seeds = {decode(prompt="a").ask.sampling.seed for _ in range(5)}
    assert len(seeds) == 5
    repeated = {decode(prompt="a", idempotency_key="k").ask.sampling.seed for _ in range(5)}
    assert len(repeated) == 1, "a repeated submission is the same job"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"token_ids": pb.TokenIds(ids=[1, 2])}, JobInput(token_ids=(1, 2))),
        (
            {"chat": pb.Chat(messages=[pb.Message(role="user", content="")])},
            JobInput(messages=(ChatMessage("user", ""),)),
        ),
        (document(document_id=DOC, questions=["q"]), JobInput(document_id=DOC, questions=("q",))),
        (document(document_id=DOC, questions=["q"] * 1024), JobInput(document_id=DOC, questions=("q",) * 1024)),
    ],
)
def test_inputs(fields: dict[str, Any], expected: JobInput) -> None:
    assert decode(**fields).input == expected


LIMITS: list[tuple[Callable[[int], dict[str, Any]], int]] = [
    (lambda n: document(text="t", questions=["q"] * n), limits.MAX_QUESTIONS),
    (lambda n: {"prompt": "a", "labels": {str(i): "" for i in range(n)}}, limits.MAX_LABELS),
    (lambda n: {"prompt": "a", "labels": {"k": "v" * n}}, limits.MAX_CHARS),
    (lambda n: {"prompt": "a", "labels": {"k" * n: "v"}}, limits.MAX_CHARS),
    (lambda n: {"prompt": "a", "idempotency_key": "ü" * n}, limits.MAX_CHARS),
    (lambda n: sampling(stop=["s"] * n), limits.MAX_STOPS),
    (lambda n: sampling(stop=["s" * n]), limits.MAX_CHARS),
    (lambda n: sampling(stop_token_ids=[1] * n), limits.MAX_STOPS),
    (lambda n: {"chat": pb.Chat(messages=[pb.Message(role="user")] * n)}, limits.MAX_MESSAGES),
    (lambda n: {"prompt": "a", "deadline_s": float(n)}, int(limits.MAX_DEADLINE_S)),
]


@pytest.mark.parametrize(("fields", "most"), LIMITS)
def test_lists_and_numbers_have_a_largest_size(fields: Callable[[int], dict[str, Any]], most: int) -> None:
    for count in (1, most - 1, most):
        assert decode(**fields(count))
    with pytest.raises(InvalidRequest, match=str(most)):
        decode(**fields(most + 1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "input: (missing): must be one of document with questions, token_ids, chat, prompt"),
        ({"prompt": ""}, "prompt: empty: must have at least one"),
        ({"token_ids": pb.TokenIds()}, "token_ids: empty: must have at least one"),
        ({"chat": pb.Chat()}, "messages: empty: must have at least one"),
        ({"chat": pb.Chat(messages=[pb.Message(role="root\n")])},
         "messages[0].role: 'root\\n': must be one of system, user, assistant, tool"),
        (document(text="t"), "document.questions: empty: must have at least one"),
        (document(questions=["q"]), "document: (missing): must have text or document_id"),
        (document(text="", questions=["q"]), "document.text: empty: must have at least one"),
        (document(text="t", questions=["q", " \n"]), "document.questions: \" \\n\" at index 1: must not be empty"),
        (document(document_id="", questions=["q"]), "doc id: '': must be doc_ and 32 hexadecimal digits"),
        (document(document_id="doc_../x", questions=["q"]),
         "doc id: 'doc_../x': must be doc_ and 32 hexadecimal digits"),
        ({"prompt": "a", "deadline_s": 0.0}, f"deadline_s: 0.0: {DEADLINE_RULE}"),
        ({"prompt": "a", "deadline_s": -1.0}, f"deadline_s: -1.0: {DEADLINE_RULE}"),
        ({"prompt": "a", "deadline_s": math.nan}, f"deadline_s: nan: {DEADLINE_RULE}"),
        ({"prompt": "a", "deadline_s": math.inf}, f"deadline_s: inf: {DEADLINE_RULE}"),
        ({"prompt": "a", "labels": {"": "v"}}, "labels: 0 characters: must have 1 to 256 characters"),
        (sampling(max_tokens=0), "max_tokens: 0: must be at least 1"),
        (sampling(temperature=math.nan), "temperature: nan: must be between 0 and 100"),
        (sampling(temperature=-0.1), "temperature: -0.1: must be between 0 and 100"),
        (sampling(top_p=0.0), "top_p: 0: must be above 0 and at most 1"),
        (sampling(min_p=1.5), "min_p: 1.5: must be between 0 and 1"),
        (sampling(repetition_penalty=0.0), "repetition_penalty: 0.0: must be between 0.01 and 100"),
        (sampling(logprobs=101), "logprobs: 101: must be between 0 and 100"),
        (sampling(seed=1 << 63), "seed: 9223372036854775808: must be between 0 and 9.22337e+18"),
        (sampling(stop=[""]), "stop: 0 characters: must have 1 to 256 characters"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(**fields)
    assert str(caught.value) == said


def test_a_text_is_stored_only_when_all_else_is_right() -> None:
    stored: list[str] = []

    def store(text: str) -> str:
        stored.append(text)
        return DOC

    request = pb.SubmitRequest(**document(text="t", questions=["q"]), labels={"": ""})
    with pytest.raises(InvalidRequest):
        codec.decode_submit(request, NOW, store)
    assert stored == []
    request.labels.clear()
    codec.decode_submit(request, NOW, store)
    assert stored == ["t"]


@pytest.mark.parametrize(("size", "expected"), [(0, 100), (1, 1), (999, 999), (1000, 1000)])
def test_page_sizes(size: int, expected: int) -> None:
    request = pb.ListRequest(states=[pb.FAILED, pb.FAILED], labels={"a": "b"}, page_size=size, page_token="c")
    assert codec.decode_list(request) == ([JobState.FAILED], {"a": "b"}, expected, "c")


@pytest.mark.parametrize(
    "request_",
    [
        pb.ListRequest(page_size=1001),
        pb.ListRequest(page_token="x" * 257),
        pb.ListRequest(states=[pb.QUEUED] * 29),
        pb.ListRequest(states=[99]),
        pb.ListRequest(states=[pb.STATE_UNSPECIFIED]),
    ],
)
def test_bad_searches(request_: pb.ListRequest) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode_list(request_)


def test_every_state_has_a_number() -> None:
    numbers = [number for number in pb.State.values() if number]
    states = codec.decode_list(pb.ListRequest(states=numbers))[0]
    assert set(states) == set(JobState)
    for number, state in zip(numbers, states, strict=True):
        record = JobRecord(new_id("job"), state, JobSpec(JobInput(prompt="a"), AnswerOptions()), 1.0)
        assert codec.encode_job(record).state == number


def test_a_job_with_one_answer_ended_and_one_running() -> None:
    ask = AnswerOptions(sampling=SamplingParams(logprobs=1))
    spec = JobSpec(JobInput(document_id=DOC, questions=("a", "b")), ask, 2, labels={"k": "v"})
    timings = [{"queued_s": 2.0, "total_s": 3.0}, {"queued_s": 1.0, "total_s": 9.0}]
    layer = {"layer": 7, "density": [0.25, 0.5], "fallbacks": [0, 2]}
    attention = {"mode": "sparse", "scale_len": 9, "held_out_recall": 0.97, "added_later": 1, "layers": [layer]}
    answers = (JobAnswer(0, 9, 4, "stop", "out", "why", timings[0], attention), JobAnswer(1, 8, 0, timings=timings[1]))
    facts = {"model": "m", "seed": 1 << 62, "versions": {"ray": "2"}, "added_later": 1}
    record = JobRecord(new_id("job"), JobState.DECODING, spec, 1.0, 2.0, None, "", 3, 1, answers, facts)
    tokens = [OutputToken(1, 0, 5, "o", -0.5, ((5, -0.5),)), OutputToken(2, 1, 6, "<think>w", reasoning="w")]
    tokens.append(OutputToken(3, 1, 7, "y</think>x", reasoning="y", answer="x"))
    job = codec.encode_job(record, tokens, {1: PrefillProgress(8, 0, 8, None)})
    assert (job.started, job.HasField("finished"), job.priority, job.restarts) == (2.0, False, 2, 1)
    ended, running = job.answers
    assert (ended.question, ended.text, ended.reasoning, ended.finish_reason) == ("a", "out", "why", "stop")
    assert (ended.prompt_tokens, ended.cached_tokens, ended.tokens[0].top[0].logprob) == (9, 4, -0.5)
    assert (running.question, running.text, list(running.token_ids)) == ("b", "x", [6, 7])
    assert running.reasoning == "wy", "what has come of it, apart as in the result"
    assert (running.progress.processed, running.progress.HasField("eta_ms")) == (8, False)
    assert (job.timings.queued_s, job.timings.total_s) == (1.0, 9.0)
    assert (job.reproducibility.seed, dict(job.reproducibility.versions)) == (1 << 62, {"ray": "2"})
    assert (ended.attention.mode, ended.attention.scale_len, ended.attention.held_out_recall) == ("sparse", 9, 0.97)
    assert [list(layer.density) for layer in ended.attention.layers] == [[0.25, 0.5]]
    assert not running.HasField("attention")
    short = codec.encode_job(record)
    assert (short.answers[0].attention.mode, list(short.answers[0].attention.layers)) == ("sparse", [])
    assert not short.answers[1].HasField("attention")
    assert (len(short.answers), list(short.answers[1].token_ids), short.last_event) == (2, [], 3)


def test_events() -> None:
    tokens = [
        OutputToken(4, 1, 9, "t", part="reasoning", reasoning="t"),
        OutputToken(5, 0, 8, "</think>so", -0.5, reasoning="", answer="so"),
    ]
    one, other = codec.encode_tokens(tokens, grouped=False)
    assert (one.number, one.token.question, one.token.token.HasField("logprob")) == (4, 1, False)
    assert (one.token.token.part, one.token.token.reasoning, one.token.token.answer) == (pb.REASONING, "t", "")
    assert (other.number, other.token.token.text, other.token.token.logprob) == (5, "</think>so", -0.5)
    assert (other.token.token.part, other.token.token.reasoning, other.token.token.answer) == (pb.ANSWER, "", "so")
    (group,) = codec.encode_tokens(tokens, grouped=True)
    assert (group.number, list(group.tokens.tokens)) == (5, [one.token, other.token])
    assert list(codec.encode_tokens(tokens[:1], grouped=True)) == [one]
    assert not codec.encode_token(tokens[0]).part, "only streams say where a token belongs"


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        pb.Sampling, max_tokens=st.integers(0, 2**32 - 1), temperature=st.floats(), top_p=st.floats(),
        seed=st.integers(0, 2**64 - 1), logprobs=st.integers(0, 2**32 - 1),
        stop=st.lists(st.text(st.characters(codec="utf-8"), max_size=300), max_size=70),
    )
)  # fmt: skip
def test_any_sampling_is_read_or_refused_in_one_line(given_: pb.Sampling) -> None:
    message = ""
    try:
        assert decode(prompt="a", sampling=given_).ask.max_tokens == given_.max_tokens
    except InvalidRequest as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


def test_a_chat_with_tools() -> None:
    chat = pb.Chat(
        messages=[
            pb.Message(role="assistant", reasoning="hm", tool_calls=[pb.ToolCall(id="c1", name="f", arguments="{}")]),
            pb.Message(role="tool", content="r", tool_call_id="c1", name="f"),
        ],
        tools=[pb.Tool(name="f", description="d", parameters="{}", strict=True)],
        tool_choice=pb.ToolChoice(mode="required", one_call=True),
    )
    assert decode(chat=chat).input == JobInput(
        messages=(
            ChatMessage("assistant", "", "hm", (ToolCall("c1", "f"),)),
            ChatMessage("tool", "r", tool_call_id="c1", name="f"),
        ),
        tools=(Tool("f", "d", "{}", True),),
        tool_choice=ToolChoice("required", "", True),
    )
    chat.tool_choice.mode = "some"
    with pytest.raises(InvalidRequest, match="tool_choice: 'some': must be one of auto, none, required, named"):
        decode(chat=chat)
