"""The constraint on one answer: its state, the mask of the next token, and when the answer is complete."""

from __future__ import annotations

from collections.abc import Collection

from cluster.constraints.compiler import Matcher, is_empty
from cluster.text.reasoning import OPEN_TAG
from cluster.text.tokenizer import TextTokenizer


class ConstrainedAnswer:
    """Follows the tokens of one answer under a constraint. Reasoning is free; what comes after it must match.

    `mask` is for the next token, see `protos.stage.messages.SampleSpec`: empty while the model reasons. `is_complete`
    says that nothing can follow: the answer ends without an end token. Methods raise ConstraintError.
    """

    def __init__(self, matcher: Matcher, end_ids: Collection[int], reasoning: bool, open_id: int | None) -> None:
        """
        Args:
            end_ids: tokens that may be sampled where the constraint is fulfilled, and end the answer.
            reasoning: the prompt ends inside `<think>`.
            open_id: the token by which the answer may begin to reason; None: it may not.
        """
        self._matcher = matcher
        self._end_ids = frozenset(end_ids)
        self._reasons = reasoning
        self._open_id = open_id
        self.is_complete = False
        self.mask = b""
        self._update()

    def push(self, token_id: int, part: str, answer: str) -> None:
        """Take the next token.

        Args:
            part: of the output after it, "reasoning" or "answer".
            answer: text of the answer that became certain with it; counts where the token also ends the reasoning.
        """
        if token_id in self._end_ids:
            return
        if self._reasons:
            self._reasons = part == "reasoning"
            if answer and not self._reasons:
                self._matcher.accept_text(answer)
        elif token_id == self._open_id:
            self._reasons = True
        else:
            self._matcher.accept(token_id)
        self._open_id = None
        self._update()

    def _update(self) -> None:
        if self._reasons:
            self.mask = b""
            return
        mask = self._matcher.mask(self._end_ids)
        self.is_complete = is_empty(mask)
        if self._open_id is not None:
            mask[self._open_id // 8] |= 1 << self._open_id % 8
        self.mask = bytes(mask)


def open_token(tokenizer: TextTokenizer, enable_thinking: bool | None) -> int | None:
    """Return the token by which an answer may begin to reason although its prompt does not; None: it may not.

    Without `enable_thinking` that is where the chat template has such a switch, as with hybrid models.
    """
    has_switch = "enable_thinking" in (tokenizer.chat_template or "")
    return tokenizer.added_id(OPEN_TAG) if enable_thinking or (enable_thinking is None and has_switch) else None
