"""The split of a stream into reasoning and answer: equal to the split of the whole text, whatever the pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.reasoning import ReasoningSplitter, opens_reasoning, split_reasoning
from tests.support.data.tokenizers import NEEDLE, SENTENCEPIECE

WORDS = ["<think>", "</think>", "<", "think>", "</", " ", "\n", "\r\n", "\t", "a", "é", "    b"]


@given(st.lists(st.sampled_from(WORDS), max_size=10), st.lists(st.integers(0, 40), max_size=8), st.booleans())
@settings(max_examples=1500, deadline=None)
def test_pieces_join_to_the_split_of_the_whole(words: list[str], cuts: list[int], opened: bool) -> None:
    text = "".join(words)
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream = ReasoningSplitter(opened)
    parts = [*(stream.push(text[a:b]) for a, b in pairwise(ends)), stream.flush()]
    reasoning, answer = "".join(r for r, _ in parts), "".join(a for _, a in parts)
    assert (reasoning or None, answer) == split_reasoning(text, opened=opened)
    assert reasoning == reasoning.strip()
    assert answer == text or text.endswith(answer), "nothing is added, and nothing but the beginning is dropped"


@given(st.lists(st.sampled_from(WORDS), max_size=10))
@settings(max_examples=300, deadline=None)
def test_without_an_opened_block_the_answer_is_the_whole_text(words: list[str]) -> None:
    text = "".join(words)
    if not text.lstrip().startswith("<think>"):
        assert split_reasoning(text) == (None, text)


@pytest.mark.parametrize(
    ("texts", "opened", "parts"),
    [
        (["<thi", "nk>", "why", " not", "</think>", "\n\n", "so"], False,
         ["answer", "reasoning", "reasoning", "reasoning", "answer", "answer", "answer"]),
        (["why", "</think>so"], True, ["reasoning", "answer"]),
        (["yes"], False, ["answer"]),
    ],
)  # fmt: skip
def test_each_token_belongs_to_a_part(texts: list[str], opened: bool, parts: list[str]):
    stream = ReasoningSplitter(opened)
    seen = []
    for text in texts:
        stream.push(text)
        seen.append(stream.part)
    assert seen == parts


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("plain", False, (None, "plain")),
        ("<think>\nwhy\n</think>\n\nanswer", False, ("why", "answer")),
        ("<think>\n\n</think>\n\nanswer", False, (None, "answer")),
        (" \n<think>why\n\nnot </think>so", False, ("why\n\nnot", "so")),
        ("why</think>answer", True, ("why", "answer")),
        ("<think>twice</think>y", True, ("twice", "y")),
        ("a < b </t </think></think>x", True, ("a < b </t", "</think>x")),
        ("why</think>answer", False, (None, "why</think>answer")),  # an instruct model writes about the tag
        ("<think>unfinished", False, ("unfinished", "")),
        ("unfinished </thi", True, ("unfinished </thi", "")),
        ("", True, (None, "")),
        ("<thi", False, (None, "<thi")),
        ("use <think> and </think> tags", False, (None, "use <think> and </think> tags")),
        ("why</think>\n\n    def f():\n", True, ("why", "    def f():\n")),
        ("<think>why</think>\r\n\tx", False, ("why", "\tx")),
        ("why</think> x", True, ("why", " x")),
        ("why</think>\n\n", True, ("why", "")),
    ],
)
def test_split_reasoning(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, opened=opened) == expected


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("why? <think>", True),
        ("why? <think>\n \n", True),
        ("why? <think>\n\n</think>\n\n", False),  # a template closes the block: /no_think
        ("why? <think>\nwell, ", False),
        ("use the tag <think>\nAnswer:", False),
        ("why?", False),
        ("", False),
    ],
)
def test_prompts_that_open_reasoning(prompt: str, opened: bool) -> None:
    for tokenizer in (NEEDLE, SENTENCEPIECE):
        assert opens_reasoning(tokenizer, tokenizer.encode("x " * 40 + prompt)) is opened
