"""Separate the reasoning of a thinking model from its answer: of a whole text, and token by token.

Reasoning is what stands in `<think>...</think>` before the answer (Qwen3, DeepSeek-R1).
"""

from __future__ import annotations

OPEN_TAG, _CLOSE_TAG = "<think>", "</think>"
REASONING, ANSWER = "reasoning", "answer"  # parts of an output


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Return (reasoning, answer) of a whole output; reasoning is None when there is none.

    A `</think>` without its start means that the prompt ended inside the tag. Thinking that never ends is all
    reasoning.

    Args:
        opened: the prompt ended with `<think>`.
    """
    before, started, rest = text.partition(OPEN_TAG)
    if started and not before.strip():
        text, opened = rest, True
    reasoning, ended, answer = text.partition(_CLOSE_TAG)
    if not ended:
        return (text.strip() or None, "") if opened else (None, text)
    if not opened and started and OPEN_TAG in reasoning:
        return None, text  # the answer talks about the tags
    return reasoning.strip() or None, answer.lstrip()


class ReasoningSplitter:
    """Splits the text of one output as it comes.

    What `push` returned so far, joined, equals `split_reasoning` of the text so far, but for a tag or white space at
    its end that later text must decide. Text before a `</think>` that nobody opened stays answer.
    """

    def __init__(self, opened: bool) -> None:
        """Args: `opened` says that the prompt ended with `<think>`."""
        self.part = REASONING if opened else ANSWER  # where the output stands
        self._state = "start"  # start (before any text), reasoning, after (white space before the answer), answer
        self._held = ""  # goes out with later text: white space, or what may become a tag
        self._has_reasoning = False

    def push(self, text: str) -> tuple[str, str]:
        """Return (reasoning, answer) that became certain with `text`, without tags and the white space around them."""
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
        self.part = REASONING if self._state == "reasoning" else ANSWER
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
            self._state = self.part
        return True

    def _reason(self) -> str:
        """Return the reasoning that is certain; at its end, leave the text after the tag in `_held`."""
        text, ended, rest = self._held.partition(_CLOSE_TAG)
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
    longest = min(len(_CLOSE_TAG) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(_CLOSE_TAG[:size])), 0)
