"""Turn the token ids of an answer into text while they are sampled, up to the first stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Sequence

from cluster.text.reasoning import ReasoningSplitter, split_reasoning
from cluster.text.token_bytes import token_bytes
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError

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

    def push(self, text: str) -> str:
        """Return the text that no stop string can claim any more; `stopped` says whether one is complete."""
        if self.stopped:
            return ""
        buffer = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if matches:
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

    Without a tokenizer there is no text. A token of `end_ids` ends the output and is no part of its text, special or
    not. `reasoning_opened` says that the prompt ended inside `<think>`.
    """

    def __init__(
        self, tokenizer: TextTokenizer | None, stop: Sequence[str], reasoning_opened: bool = False,
        end_ids: Collection[int] = frozenset(),
    ) -> None:  # fmt: skip
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._end_ids = end_ids
        self._matcher = StopMatcher(stop)
        self._splitter = ReasoningSplitter(reasoning_opened)
        self._reasoning_opened = reasoning_opened
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the output."""
        return self._matcher.stopped

    @property
    def part(self) -> str:
        """The part that the newest text belongs to: "reasoning" or "answer"."""
        return self._splitter.part

    def push(self, token_id: int, is_last: bool = False) -> tuple[str, str, str]:
        """Return the text that became certain with a token, and what it adds to reasoning and to the answer.

        With `is_last` the output ends with this token: nothing is withheld.
        """
        text = ""
        if self._decoder is not None:
            if token_id not in self._end_ids:
                text = self._matcher.push(self._decoder.push(token_id))
            text += self._rest() if is_last else ""
        self._pieces.append(text)
        return text, *self._splitter.push(text)

    def flush(self) -> None:
        """Add what is withheld: the output has ended with the last token that was pushed."""
        self._pieces.append(self._rest())

    def result(self) -> tuple[str | None, str]:
        """Return (reasoning, answer) of everything so far; see `split_reasoning`."""
        return split_reasoning("".join(self._pieces), opened=self._reasoning_opened)

    def _rest(self) -> str:
        if self._decoder is None or self._matcher.stopped:
            return ""
        return self._matcher.push(self._decoder.flush()) + self._matcher.flush()
