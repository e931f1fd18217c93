"""Completions of raw prompts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.jobs.model import InvalidJob
from tests.support.rigs.http import AnsweringService, direct_client, needle_tokenizer


def ask(service: AnsweringService, **body: Any) -> Any:
    async def run() -> Any:
        with direct_client(service) as client:
            return await client.post("/v1/completions", json=body)

    return asyncio.run(run())


@pytest.mark.parametrize(("prompt", "texts", "ids"), [
    ("a<|im_end|>", ["a<|im_end|>"], [None]), (["a", "b"], ["a", "b"], [None, None]),
    ([5, 6], [None], [(5, 6)]), ([[5], [6, 7]], [None, None], [(5,), (6, 7)]),
])  # fmt: skip
def test_texts_and_token_ids_one_or_several(prompt: Any, texts: list[Any], ids: list[Any]) -> None:
    service = AnsweringService()
    answer = ask(service, prompt=prompt, max_tokens=5).json()
    assert [spec.input.prompt for spec in service.specs] == texts
    assert [spec.input.token_ids for spec in service.specs] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert {choice["text"] for choice in answer["choices"]} == {"The answer is forty-two."}
    assert answer["object"] == "text_completion"
    assert answer["usage"]["total_tokens"] == 23 * len(texts)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 5 * len(texts)}


def test_token_ids_are_the_prompt_in_errors() -> None:
    service = AnsweringService()
    service.error = InvalidJob("token_ids: 999 at index 0: must be between 0 and 511")
    assert ask(service, prompt=[999]).json()["error"]["param"] == "prompt"


def test_reasoning_is_text_like_any_other() -> None:
    answer = ask(AnsweringService(reasoning=("hm ",)), prompt="a").json()
    assert answer["choices"][0]["text"] == "hm The answer is forty-two."


def test_several_answers_to_each_prompt() -> None:
    service = AnsweringService()
    body = {"prompt": ["a", "b"], "n": 3, "seed": 5, "max_tokens": 5, "echo": True}
    answer = ask(service, **body).json()
    assert [spec.input.prompt for spec in service.specs] == ["a", "a", "a", "b", "b", "b"]
    assert [spec.ask.sampling.seed for spec in service.specs] == [5, 6, 7, 5, 6, 7]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "a", "b", "b", "b"]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (34, 36, 70)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 10}
    stream = ask(AnsweringService(), **body, stream=True).text
    events = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    for choice in answer["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]


def test_the_prompt_comes_first_when_asked_for() -> None:
    ids = needle_tokenizer().encode("hello there")
    for prompt in ("hello there", ids):
        assert ask(AnsweringService(("!",)), prompt=prompt, echo=True).json()["choices"][0]["text"] == "hello there!"
    stream = ask(AnsweringService(("!",)), prompt=ids, echo=True, stream=True).text
    first = json.loads(stream.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["text"] == "hello there"


def test_log_probabilities_have_four_lists_of_equal_length() -> None:
    found = ask(AnsweringService(("a", "bc")), prompt="x", logprobs=2).json()["choices"][0]["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in found.values()} == {2}
    assert found["text_offset"] == [0, 1]
    assert all(-2.0 in top.values() for top in found["top_logprobs"])


def test_a_stream_of_several_prompts() -> None:
    answer = ask(AnsweringService(("a", "b")), prompt=["x", "y"], stream=True, stream_options={"include_usage": True})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *found, last = [json.loads(event) for event in events]
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "ab"
        assert [choice["finish_reason"] for choice in mine] == [None, None, "stop"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(("body", "param"), [
    ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": "a", "logprobs": 21}, "logprobs"), ({"prompt": "a", "n": 9}, "n"),
    ({"prompt": ["a"] * 20, "n": 4}, "n"),
    ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "stream"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "max_tokens": 0, "logprobs": 1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"prompt": "a", "best_of": 3}, "best_of"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    refused = ask(AnsweringService(), **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith(param)
