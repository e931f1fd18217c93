"""Separate reasoning (`<think>...</think>`) from the answer: of a whole text, or while tokens still come."""

from __future__ import annotations

from typing import Literal

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Return (reasoning, answer) of a whole text; reasoning is None when there is none.

    Reasoning that never ends is all there is. A `</think>` without its start means that the prompt opened it; `opened`
    says that it did.
    """
    before, started, rest = text.partition(OPEN_TAG)
    if started and not before.strip():
        text, opened = rest, True
    reasoning, ended, answer = text.partition(CLOSE_TAG)
    if not ended:
        return (text.strip() or None, "") if opened else (None, text)
    if not opened and started and OPEN_TAG in reasoning:
        return None, text  # the answer talks about the tags
    return reasoning.strip() or None, answer.lstrip()


class ReasoningSplitter:
    """Splits the text of one output as it comes.

    What `push` returned so far, joined, equals `split_reasoning` of the text so far, but for a tag or white space at
    its end that the next text must decide, and for a `</think>` without its start, which stays answer. `opened` says
    that the prompt ended inside `<think>`.
    """

    def __init__(self, opened: bool) -> None:
        self._opened = opened
        self._state: Literal["start", "reasoning", "after", "answer"] = "start"  # after: white space before the answer
        self._held = ""  # white space, or the beginning of a tag: decided by the next text
        self._has_reasoning = False

    @property
    def part(self) -> Literal["reasoning", "answer"]:
        """The part that the newest text belongs to."""
        is_reasoning = self._opened if self._state == "start" else self._state == "reasoning"
        return "reasoning" if is_reasoning else "answer"

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
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "after"
        if self._state == "answer":
            answer, self._held = self._held, ""
        return reasoning, answer

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
