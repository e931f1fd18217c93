"""The budget of reasoning: which token is forced when, for every way in which an answer can reason."""

from __future__ import annotations

import random

import pytest

from cluster.constraints.thinking import ThinkingBudget, closing_ids
from cluster.text.detokenizer import OutputText
from cluster.text.reasoning import split_reasoning
from protos.errors import UserError
from tests.support.data.tokenizers import NEEDLE, SENTENCEPIECE

PIECES = ["<think>", "</think>", "\n", " ", "so", "<", "</", "think>", "é", "the", "\n\n", "\u4e2d"]


def ids(text: str) -> list[int]:
    return NEEDLE.encode(text, literal=True, continues=True)


def run(wanted: list[int], budget: int, opened: bool, closing: list[int]) -> list[int]:
    """Return the tokens of an answer that wants to be `wanted`."""
    text, thinking, tokens = OutputText(NEEDLE, (), opened), ThinkingBudget(budget, closing, opened), []
    left = list(wanted)
    while left and len(tokens) < 300:
        free_until, forced = thinking.free_until, thinking.forced
        assert forced is None or (free_until is not None and len(tokens) >= free_until), "forced behind the free ones"
        token = left.pop(0) if forced is None else forced
        tokens.append(token)
        text.push(token)
        thinking.push(text.part, text.may_reason)
        after = thinking.free_until
        assert after is None or (free_until is not None and after >= free_until), "what was free stays free"
    return tokens


def reference(wanted: list[int], budget: int, opened: bool, closing: list[int]) -> list[int]:
    """The same from the definition: of the text so far, when does reasoning begin, and has it ended?"""
    tokens: list[int] = []
    begin = 0 if opened else None
    left = list(wanted)
    while left and len(tokens) < 300:
        text = NEEDLE.decode(tokens, skip_special=False)
        if begin is None and text.lstrip().startswith("<think>"):
            begin = len(tokens)
        inside = begin is not None and "</think>" not in text
        at = len(tokens) - begin - budget if inside and begin is not None else -1
        tokens.append(closing[at] if 0 <= at < len(closing) else left.pop(0))
    return tokens


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 3, 17, 67])
def test_against_the_definition(budget: int, opened: bool) -> None:
    closing = closing_ids(NEEDLE, budget, (), opened)
    for seed in range(60):
        draw = random.Random(seed)
        begin = "" if opened or draw.random() < 0.3 else draw.choice(["<think>", " <think>\n", "\n<think>"])
        wanted = ids(begin + "".join(draw.choices(PIECES, k=draw.randrange(1, 60))))
        tokens = run(wanted, budget, opened, closing)
        assert tokens == reference(wanted, budget, opened, closing)
        reasoning, _ = split_reasoning(NEEDLE.decode(tokens, skip_special=False), opened=opened)
        assert len(ids(reasoning or "")) <= budget + len(closing) + 8


def test_sentence_and_tag_end_it() -> None:
    text = NEEDLE.decode(closing_ids(NEEDLE, 5, (), True))
    assert text.startswith("\n\nConsidering the limited time by the user")
    assert text.endswith("directly now.\n</think>")


@pytest.mark.parametrize(("prompt", "closing"), [("<think>\n", "\n</think>"), ("<think>", "\n\n</think>"),
                                                 ("<think>\n\n", "</think>")])  # fmt: skip
def test_no_budget_leaves_an_empty_block(prompt: str, closing: str) -> None:
    assert NEEDLE.decode(closing_ids(NEEDLE, 0, ids(prompt), True)) == closing
    assert NEEDLE.decode(closing_ids(NEEDLE, 0, ids("a\n"), False)) == "\n\n</think>"


def test_answers_that_do_not_reason_are_free() -> None:
    thinking = ThinkingBudget(0, [1, 2], False)
    assert (thinking.forced, thinking.free_until) == (None, 1)
    thinking.push("answer", False)
    assert (thinking.forced, thinking.free_until) == (None, None)


def test_closed_once_only() -> None:
    """A closing that does not close, as after a text that decodes otherwise, is not repeated."""
    thinking = ThinkingBudget(1, [8, 9], True)
    forced = []
    for _ in range(6):
        forced.append(thinking.forced)
        thinking.push("reasoning", False)
    assert forced == [None, 8, 9, None, None, None]


def test_a_tokenizer_that_cannot_write_the_tag() -> None:
    class Poor:
        def encode(self, text: str, continues: bool) -> list[int]:
            return [1]

        def decode(self, tokens: list[int], skip_special: bool) -> str:
            return "?"

    with pytest.raises(UserError, match="thinking_budget: 5: this model's tokenizer cannot write </think>"):
        closing_ids(Poor(), 5, (), True)  # type: ignore[arg-type]
    assert SENTENCEPIECE.decode(closing_ids(SENTENCEPIECE, 5, (), True)).endswith("</think>")
