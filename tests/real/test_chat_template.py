"""The chat template in a GGUF file renders as in transformers and in llama.cpp."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cluster.text.chat_prompt import encode_chat
from cluster.text.chat_template import render_chat
from cluster.text.tokenizer import TextTokenizer
from tests.support.real.llama_cpp import LlamaServer
from tests.support.real.texts import CONVERSATIONS, TOOLS

NUMBERS = range(len(CONVERSATIONS))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_prompts_are_those_of_transformers(
    ours: TextTokenizer, theirs: PreTrainedTokenizerBase, number: int, tools: list[dict[str, object]] | None
) -> None:
    messages = CONVERSATIONS[number]
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert render_chat(ours, messages, tools=tools) == expected
    assert encode_chat(ours, messages, tools=tools) == theirs.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("number", NUMBERS)
def test_prompts_are_those_of_llama_cpp(ours: TextTokenizer, llama: LlamaServer, number: int) -> None:
    assert llama.chat_prompt(CONVERSATIONS[number]) == render_chat(ours, CONVERSATIONS[number])
