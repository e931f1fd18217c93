"""Separate reasoning (`<think>...</think>`) from the answer: of a whole text, or while tokens still come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cluster.text.tokenizer import TextTokenizer

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
_TAIL = 32  # ids at the end of a prompt in which the opening tag is looked for
_NEWLINES = "\r\n"


def opens_reasoning(tokenizer: TextTokenizer, prompt: Sequence[int]) -> bool:
    """Return whether a prompt ends with `<think>`, so that its answer starts as reasoning.

    White space may follow the tag. A block that the prompt closes, or goes on with, is the prompt's own.
    """
    return tokenizer.decode(list(prompt[-_TAIL:]), skip_special=False).rstrip().endswith(OPEN_TAG)


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Return (reasoning, answer) of a whole text; reasoning is None when there is none.

    Reasoning begins with the text (`opened`: the prompt has begun it) or there is none: tags further on are part of
    the answer. Reasoning that never ends is all there is. The newlines behind it are dropped, an indent stays.
    """
    splitter = ReasoningSplitter(opened)
    parts = splitter.push(text), splitter.flush()
    reasoning, answer = ("".join(part) for part in zip(*parts, strict=True))
    return reasoning or None, answer


class ReasoningSplitter:
    """Splits the text of one output as it comes, so that all pieces joined equal `split_reasoning` of the whole.

    `opened` says that the prompt ended inside `<think>`.
    """

    def __init__(self, opened: bool) -> None:
        self._opened = opened
        self._state: Literal["start", "reasoning", "after", "answer"] = "start"  # after: newlines before the answer
        self._held = ""  # white space, or the beginning of a tag: decided by the next text
        self._has_reasoning = False

    @property
    def part(self) -> Literal["reasoning", "answer"]:
        """The part that the newest text belongs to."""
        is_reasoning = self._opened if self._state == "start" else self._state == "reasoning"
        return "reasoning" if is_reasoning else "answer"

    @property
    def may_open(self) -> bool:
        """Whether the text so far may still become an opening tag, or begin the reasoning that a prompt has opened."""
        return self._state == "start"

    @property
    def undecided(self) -> str:
        """The text so far, while it may be the answer's or belong to an opening tag."""
        return self._held if self._state == "start" and not self._opened else ""

    def push(self, text: str) -> tuple[str, str]:
        """Return (reasoning, answer) that became certain with this text, without tags and white space around them."""
        self._held += text
        if self._state == "start":  # until the text can no longer become an opening tag
            start = self._held.lstrip()
            if start.startswith(OPEN_TAG):
                self._state, self._held = "reasoning", start[len(OPEN_TAG) :]
            elif not OPEN_TAG.startswith(start):
                self._state = "reasoning" if self._opened else "answer"
        reasoning = self._take_reasoning() if self._state == "reasoning" else ""
        answer = ""
        if self._state == "after":
            self._held = self._held.lstrip(_NEWLINES)
            self._state = "answer" if self._held else "after"
        if self._state == "answer":
            answer, self._held = self._held, ""
        return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """Return (reasoning, answer) of what is withheld: the output has ended."""
        rest, self._held = self._held, ""
        if self.part == "answer":
            return "", rest
        rest = rest.rstrip() if self._has_reasoning else rest.strip()
        return rest, ""

    def _take_reasoning(self) -> str:
        text, ended, rest = self._held.partition(CLOSE_TAG)
        if ended:
            self._state, self._held = "after", rest
            text = text.rstrip()
        else:
            certain = text[: len(text) - _partial_tag(text)].rstrip()
            text, self._held = certain, text[len(certain) :]
        if not self._has_reasoning:
            text = text.lstrip()
            self._has_reasoning = bool(text)
        return text


def _partial_tag(text: str) -> int:
    """Return the length of the longest end of `text` that begins the closing tag."""
    longest = min(len(CLOSE_TAG) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(CLOSE_TAG[:size])), 0)
