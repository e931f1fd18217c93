"""Qwen-Agent: its chat model, with tools of the server's and with its own prompt for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.data.clients import look_up

llm = pytest.importorskip("qwen_agent.llm", reason="comes with the extra clients")


def model_of(url: str, **generate: Any) -> Any:
    served = {"model": "needle", "model_type": "oai", "model_server": f"{url}/v1", "api_key": "none"}
    return llm.get_chat_model({**served, "generate_cfg": {"max_retries": 0, **generate}})


def last(stream: Any) -> list[dict[str, Any]]:
    """Return what a stream of ever longer answers ends with."""
    *_, answer = stream
    return answer  # type: ignore[no-any-return]


@pytest.mark.parametrize("thinking", [{}, {"extra_body": {"enable_thinking": False}}])
def test_chat(url: str, thinking: dict[str, Any]) -> None:
    model = model_of(url, top_k=20, **thinking)
    (whole,) = model.chat(look_up.ASK_WITH_TEXT, stream=False)
    (streamed,) = last(model.chat(look_up.ASK_WITH_TEXT, stream=True))
    parts = [one["content"] for (one,) in model.chat(look_up.ASK_WITH_TEXT, stream=True, delta_stream=True)]
    assert [whole["content"], streamed["content"], "".join(parts)] == [look_up.ANSWER] * 3


def test_a_turn_with_tools(url: str) -> None:
    model = model_of(url, use_raw_api=True)
    forced = {"tool_choice": look_up.NAMED}
    (call,) = last(model.chat(look_up.ASK, functions=[look_up.FUNCTION], extra_generate_cfg=forced))
    assert call["function_call"]["name"] == look_up.NAME
    assert json.loads(call["function_call"]["arguments"]) == look_up.ARGUMENTS
    result = {"role": "function", "name": look_up.NAME, "content": look_up.RESULT, "extra": call["extra"]}
    (answer,) = last(model.chat([*look_up.ASK, call, result], functions=[look_up.FUNCTION]))
    assert answer["content"] == look_up.ANSWER


def test_a_result_in_its_own_prompt_for_tools(url: str) -> None:
    model = model_of(url)
    call = {"role": "assistant", "content": "", "function_call": {"name": look_up.NAME, "arguments": "{}"}}
    result = {"role": "function", "name": look_up.NAME, "content": look_up.RESULT}
    (answer,) = last(model.chat([*look_up.ASK, call, result], functions=[look_up.FUNCTION]))
    assert answer["content"]
