"""The bound on the reasoning of one answer: which tokens end it, and when they come."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.text.reasoning import CLOSE_TAG
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError

# what Qwen recommends to stop its models with
_SENTENCE = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
)
_EMPTY = "\n\n"  # between the tags of a block without reasoning
_TAIL = 4  # ids at the end of a prompt whose line breaks are counted


class ThinkingBudget:
    """Follows the tokens of one answer: after `budget` tokens of reasoning come those of `closing`."""

    def __init__(self, budget: int, closing: Sequence[int], reasoning: bool) -> None:
        """Args: `reasoning` says that the prompt ends inside `<think>`."""
        self._budget = budget
        self._closing = closing
        self._begin = 0 if reasoning else None  # index of the first token of the reasoning
        self._count = 0  # tokens of the answer
        self._is_over = False

    @property
    def forced(self) -> int | None:
        """The next token; None where it is free."""
        if self._is_over or self._begin is None:
            return None
        at = self._count - self._begin - self._budget
        return self._closing[at] if at >= 0 else None

    @property
    def free_until(self) -> int | None:
        """Tokens of the answer with a lower index are free, whatever comes before them; None: all are."""
        if self._is_over:
            return None
        return self._budget + (self._count + 1 if self._begin is None else self._begin)

    def push(self, part: str, may_begin: bool) -> None:
        """Take the next token.

        Args:
            part: of the output after it, "reasoning" or "answer".
            may_begin: the output so far may still be the beginning of an opening tag.
        """
        self._count += 1
        if part == "reasoning" and self._begin is None:
            self._begin = self._count
        has_closed = self._begin is not None and self._count >= self._begin + self._budget + len(self._closing)
        self._is_over = has_closed or (part == "answer" and not may_begin)


def closing_ids(tokenizer: TextTokenizer, budget: int, prompt: Sequence[int], reasoning: bool) -> list[int]:
    """Return the tokens that end the reasoning of an answer: a sentence and `</think>`.

    Without a budget the block is left empty, as templates write it that switch thinking off.

    Args:
        reasoning: the prompt ends inside `<think>`.

    Raises:
        UserError: the tokenizer cannot write them.
    """
    text = _SENTENCE
    if not budget:
        tail = tokenizer.decode(list(prompt[-_TAIL:]), skip_special=False) if reasoning else ""
        text = _EMPTY[len(tail) - len(tail.rstrip("\n")) :]
    ids = tokenizer.encode(text + CLOSE_TAG, continues=True)
    if not tokenizer.decode(ids, skip_special=False).endswith(CLOSE_TAG):
        raise UserError(f"thinking_budget: {budget}: this model's tokenizer cannot write {CLOSE_TAG}: leave it out")
    return ids
