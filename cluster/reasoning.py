"""Reasoning and answer apart while tokens still come: the twin of `split_reasoning`, which needs the whole text."""

from __future__ import annotations

from cluster.jobs import JobSpec
from cluster.prompts import opens_thinking
from cluster.tokenizer import TextTokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_TAIL = 16  # ids at the end of a prompt that can hold the opening tag


def reasoning_opened(tokenizer: TextTokenizer, spec: JobSpec) -> bool:
    """Whether the prompts of a job end inside `<think>`, so that their answers start as reasoning."""
    given = spec.input
    if given.document_id or given.messages is not None:
        return opens_thinking(tokenizer, spec.ask.enable_thinking)
    if given.prompt is not None:
        return given.prompt.rstrip().endswith(_OPEN)
    ids = list(given.token_ids or ())[-_TAIL:]
    return tokenizer.decode(ids, skip_special=False).rstrip().endswith(_OPEN)


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
        if start.startswith(_OPEN):
            self._held = start[len(_OPEN) :]
            self._state = "reasoning"
        elif _OPEN.startswith(start):
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
