"""Reasoning and answer apart while tokens still come: the twin of `split_reasoning`, which needs the whole text."""

from __future__ import annotations

OPEN_TAG, _CLOSE = "<think>", "</think>"


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Separate `<think>...</think>` from the answer: (reasoning, answer); reasoning is None when there is none.

    `opened`: the prompt already ended with `<think>`. A `</think>` without its start means the same. Thinking that
    never ends is all reasoning.
    """
    before, started, rest = text.partition("<think>")
    if started and not before.strip():
        text, opened = rest, True
    reasoning, ended, answer = text.partition("</think>")
    if not ended:
        return (text.strip() or None, "") if opened else (None, text)
    if not opened and started and "<think>" in reasoning:
        return None, text  # the answer talks about the tags
    return reasoning.strip() or None, answer.lstrip()


class ReasoningStream:
    """Splits the text of one answer as it comes.

    What `push` returned so far, joined, equals what `split_reasoning` makes of the text so far, but for a tag or white
    space at its end that the next text must decide. Text that closes reasoning nobody opened stays answer.
    """

    def __init__(self, opened: bool) -> None:
        """`opened`: the prompt ended inside `<think>`."""
        self._opened = opened
        self._state = "start"  # start, reasoning, after (white space before the answer), answer
        self._held = ""  # belongs to the next text: white space, or what may become a tag
        self._spoken = False  # reasoning had text

    @property
    def part(self) -> str:
        """`reasoning` or `answer`: where the text stands."""
        if self._state == "start":
            return "reasoning" if self._opened else "answer"
        return "reasoning" if self._state == "reasoning" else "answer"

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that became certain with this text, without tags and the white space around them."""
        self._held += text
        if self._state == "start" and not self._begin():
            return "", ""
        reasoning = self._reason() if self._state == "reasoning" else ""
        answer = ""
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            answer, self._held = self._held, ""
        return reasoning, answer

    def _begin(self) -> bool:
        """Decide between a tag and text; false while it may be either."""
        start = self._held.lstrip()
        if start.startswith(OPEN_TAG):
            self._held = start[len(OPEN_TAG) :]
            self._state = "reasoning"
        elif OPEN_TAG.startswith(start):
            return False
        else:
            self._state = "reasoning" if self._opened else "answer"
        return True

    def _reason(self) -> str:
        text, ended, rest = self._held.partition(_CLOSE)
        if ended:
            self._state, self._held = "after", rest
            text = text.rstrip()
        else:
            certain = text[: len(text) - _half_tag(text)].rstrip()
            text, self._held = certain, text[len(certain) :]
        if not self._spoken:
            text = text.lstrip()
            self._spoken = bool(text)
        return text


def _half_tag(text: str) -> int:
    """Length of the longest end of `text` that begins the closing tag."""
    longest = min(len(_CLOSE) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(_CLOSE[:size])), 0)
