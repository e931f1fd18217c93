"""OpenAI's own client over a service whose answers are written down: reasoning, limits, ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cluster.jobs.model import JobState, ServiceBusy
from protos.jobs.constraint import Constraint
from tests.support.rigs.head import until
from tests.support.rigs.http import TEAM_KEY as KEY
from tests.support.rigs.http import AnsweringService, serving_http

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def url(scripted: str) -> str:
    return f"{scripted}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="needle", messages=HI, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    (choice,) = answer.choices
    assert choice.message.content == "The answer is forty-two."
    assert choice.message.reasoning_content == "hm so"  # type: ignore[attr-defined]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[2].top_logprobs[0].logprob == -0.25
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 5


def test_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="needle", messages=HI, stream=True, stream_options={"include_usage": True},  # type: ignore[arg-type]
        extra_body={"return_progress": True, "chat_template_kwargs": {"enable_thinking": True}},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The answer is forty-two."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[1].prompt_progress["total"] == 100  # type: ignore[attr-defined]


def test_several_answers_and_what_bends_them(client: openai.OpenAI, service: AnsweringService) -> None:
    bent: dict[str, Any] = {
        "n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {"5": -100}, "seed": 3,
        "extra_body": {"thinking_token_budget": 7, "min_tokens": 2},
    }  # fmt: skip
    answer = client.chat.completions.create(model="needle", messages=HI, **bent)
    assert [choice.index for choice in answer.choices] == [0, 1]
    chunks = list(client.chat.completions.create(model="needle", messages=HI, stream=True, **bent))
    for index in (0, 1):
        texts = [c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index]
        assert "".join(texts) == "The answer is forty-two."
    asks = [spec.ask for spec in service.specs]
    assert [ask.sampling.seed for ask in asks] == [3, 4, 3, 4]
    assert {(ask.thinking_budget, ask.min_tokens, ask.logit_bias) for ask in asks} == {(7, 2, ((5, -100.0),))}


def test_closing_a_stream_ends_the_job(service: AnsweringService, client: openai.OpenAI) -> None:
    service.endless = True
    stream = client.chat.completions.create(model="needle", messages=HI, stream=True)  # type: ignore[arg-type]
    for _ in range(3):
        next(stream)
    stream.close()
    until(lambda: [record.state for record in service.records.values()] == [JobState.CANCELLED])


def test_errors_are_those_that_the_client_knows(service: AnsweringService, client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="needle", messages=HI, n=9)  # type: ignore[arg-type]
    assert (bad.value.param, bad.value.status_code) == ("n", 400)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=HI)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    service.error = ServiceBusy("queue: 256 jobs wait", 0.05)
    with pytest.raises(openai.RateLimitError, match="256 jobs wait"):
        client.chat.completions.create(model="needle", messages=HI)  # type: ignore[arg-type]
    service.outcome, service.error = JobState.FAILED, None
    with pytest.raises(openai.InternalServerError, match="the pipeline broke"):
        client.chat.completions.create(model="needle", messages=HI)  # type: ignore[arg-type]
    with pytest.raises(openai.APIError, match="the pipeline broke"):
        list(client.chat.completions.create(model="needle", messages=HI, stream=True))  # type: ignore[arg-type]


def test_the_client_tries_again_when_it_was_told_to(service: AnsweringService, url: str) -> None:
    service.error = ServiceBusy("full", 0.05)
    submit, tries = service.submit, []

    def later(*arguments: object) -> object:
        tries.append(1)
        service.error = None if len(tries) == 3 else service.error
        return submit(*arguments)  # type: ignore[arg-type]

    service.submit = later  # type: ignore[method-assign, assignment]
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=3) as client:
        assert client.chat.completions.create(model="needle", messages=HI).choices  # type: ignore[arg-type]
    assert len(tries) == 3


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    },
    {"type": "function", "function": {"name": "now"}},
]
CALLS = (
    '<tool_call>\n{"name": "f", "arg',
    'uments": {"a": 1}}\n</tool',
    '_call>\n<tool_call>\n{"name": "now"}\n</tool_call>',
)


def test_a_turn_with_tools() -> None:
    service = AnsweringService(CALLS, ("hm",))
    with serving_http(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        made = client.chat.completions.create(model="needle", messages=HI, tools=TOOLS, tool_choice="required")  # type: ignore[call-overload]
        choice = made.choices[0]
        assert choice.finish_reason == "tool_calls"
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("f", '{"a": 1}'), ("now", "{}")]
        with client.chat.completions.stream(model="needle", messages=HI, tools=TOOLS) as stream:  # type: ignore[arg-type]
            streamed = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed is not None
        assert [(call.function.name, call.function.arguments) for call in streamed] == calls
        results = [{"role": "tool", "tool_call_id": call.id, "content": "2"} for call in choice.message.tool_calls]
        history = [*HI, choice.message.model_dump(exclude_unset=True), *results]
        service.output = service.output[:1]
        client.chat.completions.create(model="needle", messages=history, tools=TOOLS)  # type: ignore[call-overload]
    said = service.specs[-1].input.messages
    assert said is not None
    assert [call.id for call in said[1].tool_calls] == [message.tool_call_id for message in said[2:]]
    assert said[1].reasoning == "hm"


def test_a_format(client: openai.OpenAI, service: AnsweringService) -> None:
    schema = {"name": "n", "strict": True, "schema": {"type": "object"}}
    client.chat.completions.create(  # type: ignore[call-overload]
        model="needle", messages=HI, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert service.specs[-1].ask.structured_outputs == Constraint("json_schema", '{"type": "object"}')
