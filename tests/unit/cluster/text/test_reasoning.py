"""The split of a stream into reasoning and answer: equal to the split of the whole text, whatever the pieces."""

from __future__ import annotations

import random

import pytest

from cluster.text.reasoning import ReasoningSplitter, split_reasoning

TEXTS = [
    "", " ", "answer", "  answer ", "<", "<b>bold</b>", "<thin", "<thing> is a word", "say <think> and </think>",
    "<think>why</think>so", "<think>\nwhy\n\nnot \n</think>\n\nso it is", " \n<think></think>\n\nso",
    "<think> \n</think>",
    "<think>never ends", "<think>a </thin k></think> b", "<think>a <think> b</think> c </think> d", "é<think>x</think>",
]  # fmt: skip
OPENED = [
    "why</think>so", "\nwhy\n</think>\n\nso", "</think>so", "never ends", "a < b </t </think></think>x",
    "<think>twice</think>y", "", "  </think>  ",
]  # fmt: skip


def pieces(text: str, noise: random.Random) -> list[str]:
    cuts = sorted(noise.randint(0, len(text)) for _ in range(noise.randint(0, len(text) + 1)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize(("text", "opened"), [*((t, False) for t in TEXTS), *((t, True) for t in OPENED + TEXTS)])
def test_pieces_join_to_the_split_of_the_whole(text: str, opened: bool):
    expected_reasoning, expected_answer = split_reasoning(text, opened=opened)
    noise = random.Random(7)
    for cut in [[text], list(text), *(pieces(text, noise) for _ in range(50))]:
        stream = ReasoningSplitter(opened)
        parts = [stream.push(piece) for piece in cut]
        reasoning, answer = "".join(r for r, _ in parts), "".join(a for _, a in parts)
        held = stream._held
        if opened or expected_reasoning is not None:
            assert (reasoning + held).strip() == (expected_reasoning or "") or reasoning == (expected_reasoning or "")
            assert answer == expected_answer
        else:
            assert (reasoning, answer + held) == ("", expected_answer)
        assert len(held.strip()) < len("</think>")


def test_random_texts():
    noise = random.Random(3)
    words = ["<think>", "</think>", "<", "think>", " ", "\n", "a", "é", "</"]
    for _ in range(3000):
        text = "".join(noise.choice(words) for _ in range(noise.randint(0, 9)))
        opened = noise.random() < 0.5
        if not opened and not text.lstrip().startswith("<think>") and "</think>" in text:
            continue  # only the whole text can tell that this was reasoning
        reasoning, answer = "", ""
        stream = ReasoningSplitter(opened)
        for piece in pieces(text, noise):
            more = stream.push(piece)
            reasoning, answer = reasoning + more[0], answer + more[1]
        whole = split_reasoning(text, opened=opened)
        if stream.part == "reasoning":
            assert (reasoning + stream._held).strip() == (whole[0] or ""), text
        else:
            assert (reasoning, answer + stream._held) == (whole[0] or "", whole[1]), text


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
        ("why</think>answer", True, ("why", "answer")),
        ("why</think>answer", False, ("why", "answer")),
        ("<think>unfinished", False, ("unfinished", "")),
        ("unfinished", True, ("unfinished", "")),
        ("", True, (None, "")),
        ("use <think> and </think> tags", False, (None, "use <think> and </think> tags")),
    ],
)
def test_split_reasoning(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, opened=opened) == expected
