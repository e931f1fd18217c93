"""Turn the token ids of an answer into text while they are sampled, up to the first stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Sequence

from cluster.text.reasoning import CLOSE_TAG, OPEN_TAG, ReasoningSplitter
from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import TextTokenizer
from cluster.text.tools.scanner import CALL_CLOSE, CALL_OPEN
from protos.errors import UserError

_SHOWN = frozenset({OPEN_TAG, CLOSE_TAG, CALL_OPEN, CALL_CLOSE})  # special in some models; what they mark is told
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of vocabularies with byte fallback


class IncrementalDecoder:
    """Decodes a growing list of ids piece by piece; the pieces and `flush()` join to `decode` of all ids.

    Never emits part of a character. The work for a token does not depend on how many came before.
    `tokenizers.decoders.DecodeStream` does not keep these promises for vocabularies with byte fallback.
    """

    _CONTEXT = 4  # visible tokens decoded again with each piece, so that spaces between words are right

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that became certain with `token_id`; often empty inside a character of several tokens."""
        entry = self._tokenizer.id_to_token(token_id)
        if entry is None or self._tokenizer.is_special(token_id):
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(token_bytes(entry))
        self._held.append(token_id)
        # A run of byte tokens is text only if the whole run is UTF-8, so it waits for its end.
        return "" if _BYTE_TOKEN.fullmatch(entry) else self._emit()

    def flush(self) -> str:
        """Return the rest, with U+FFFD for bytes that never became a character; the decoder starts anew."""
        rest = self._utf8.decode(b"", final=True) + (self._emit() if self._held else "")
        self._context.clear()
        return rest

    def _emit(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._held)
        visible = [i for i in self._held if not _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(i) or "")]
        self._context = (self._context + visible)[-self._CONTEXT :]
        self._held = []
        return text[len(before) :]


class StopMatcher:
    """Passes text on until the first stop string is complete; drops the stop string and what follows.

    Of several stop strings the one that ends first wins, then the longest, so that pieces of any size give the same
    text.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if not all(stop_strings):
            raise UserError('stop: "": a stop string must have at least one character')
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str, counts: bool = True) -> str:
        """Return the text that no stop string can claim any more; `stopped` says whether one is complete.

        Args:
            counts: False where a stop string that this text completes does not stop anything.
        """
        if self.stopped:
            return ""
        buffer, old = self._held + text, len(self._held)
        matches = [
            (at + len(stop), at) for stop in self._stops if (at := buffer.find(stop, max(0, old + 1 - len(stop)))) >= 0
        ]
        if matches and counts:
            self._held, self.stopped = "", True
            return buffer[: min(matches)[1]]
        held = range(max(0, len(buffer) - self._longest + 1), len(buffer))  # may begin a stop string
        certain = next((at for at in held if any(stop.startswith(buffer[at:]) for stop in self._stops)), len(buffer))
        self._held = buffer[certain:]
        return buffer[:certain]

    def flush(self) -> str:
        """Return the withheld text of an output that ended without a stop string."""
        rest, self._held = self._held, ""
        return rest


class OutputText:
    """Turns the tokens of one request into text: up to the first stop string, with reasoning and answer apart.

    A stop string counts in the answer only: what the model reasons, tags and the newlines behind them cannot hold one.
    A token of `end_ids` ends the output and is no part of its text, special or not. Without a tokenizer there is no
    text. `reasoning_opened` says that the prompt ended inside `<think>`. What the first `min_tokens` tokens complete is
    no stop string.
    """

    def __init__(
        self, tokenizer: TextTokenizer | None, stop: Sequence[str], reasoning_opened: bool = False,
        end_ids: Collection[int] = frozenset(), min_tokens: int = 0,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._end_ids = end_ids
        self._matcher = StopMatcher(stop)
        self._left = min_tokens + 1  # tokens until stop strings count
        self._splitter = ReasoningSplitter(reasoning_opened)
        self._parts: tuple[list[str], list[str]] = ([], [])  # reasoning, answer

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the output."""
        return self._matcher.stopped

    @property
    def part(self) -> str:
        """The part that the newest text belongs to: "reasoning" or "answer"."""
        return self._splitter.part

    @property
    def may_reason(self) -> bool:
        """Whether the output may still begin with reasoning: all of it so far may belong to an opening tag."""
        return self._splitter.may_open

    def push(self, token_id: int, is_last: bool = False) -> tuple[str, str, str]:
        """Return the text that became certain with a token, and what it adds to reasoning and to the answer.

        With `is_last` the output ends with this token: nothing is withheld.
        """
        self._left = max(0, self._left - 1)
        added = self._add(self._decode(token_id))
        if is_last and not self.stopped:
            text, reasoning, answer = self.flush()
            return added[0] + text, added[1] + reasoning, added[2] + answer
        return added

    def flush(self) -> tuple[str, str, str]:
        """Return, as `push` does, what was withheld: the output has ended with the last token that was pushed."""
        if self._decoder is None or self.stopped:
            return "", "", ""
        return self._add(self._decoder.flush(), is_end=True)

    def result(self) -> tuple[str | None, str]:
        """Return (reasoning, answer): what `push` and `flush` have returned so far, joined; None without reasoning."""
        reasoning, answer = map("".join, self._parts)
        return reasoning or None, answer

    def _decode(self, token_id: int) -> str:
        if self._tokenizer is None or self._decoder is None or token_id in self._end_ids:
            return ""
        if self._tokenizer.is_special(token_id):  # otherwise without text
            entry = self._tokenizer.id_to_token(token_id)
            return self._decoder.flush() + entry if entry in _SHOWN else ""
        return self._decoder.push(token_id)

    def _add(self, raw: str, is_end: bool = False) -> tuple[str, str, str]:
        """Split more decoded text; return what became certain of the whole, of reasoning and of the answer."""
        certain = self._splitter.undecided + raw
        reasoning, answer = self._splitter.push(raw)
        if is_end:
            rest = self._splitter.flush()
            reasoning, answer = reasoning + rest[0], answer + rest[1]
        before = "" if self._splitter.undecided else certain[: len(certain) - len(answer)]  # the answer is its end
        answer = self._matcher.push(answer, counts=not self._left) + (self._matcher.flush() if is_end else "")
        for part, piece in zip(self._parts, (reasoning, answer), strict=True):
            part.append(piece)
        return before + answer, reasoning, answer
