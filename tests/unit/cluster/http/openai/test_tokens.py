"""The served model and its tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.rigs.http import AnsweringService, direct_client, needle_tokenizer


def post(path: str, **body: Any) -> Any:
    async def run() -> Any:
        with direct_client(AnsweringService()) as client:
            return await client.post(path, json=body)

    return asyncio.run(run())


def test_models_say_how_long_a_context_may_be() -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            listed = (await client.get("/v1/models")).json()
            assert listed["object"] == "list"
            (model,) = listed["data"]
            assert (model["id"], model["object"], model["max_model_len"]) == ("needle", "model", 4096)
            assert (await client.get("/v1/models/needle")).json() == model
            other = await client.get("/v1/models/org/other")
            assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")

    asyncio.run(run())


def test_tokens_and_back() -> None:
    text = "a <|im_end|> b\n"
    found = post("/tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == needle_tokenizer().encode(text, add_special=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 4096
    assert post("/detokenize", tokens=found["tokens"]).json() == {"prompt": text}


def test_messages_are_tokenised_as_a_chat() -> None:
    found = post(
        "/tokenize", messages=[{"role": "user", "content": [{"type": "text", "text": "hi <|im_end|>"}]}]
    ).json()
    shown = post("/detokenize", tokens=found["tokens"]).json()["prompt"]
    assert "hi <|im_end|>" in shown
    end = needle_tokenizer().encode("<|im_end|>")
    assert found["tokens"].count(end[0]) == shown.count("<|im_end|>") - 1  # that of the message stays text


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"), ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": [1 << 31]}, "tokens"),
])  # fmt: skip
def test_bad_requests(path: str, body: dict[str, Any], param: str) -> None:
    refused = post(path, **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
