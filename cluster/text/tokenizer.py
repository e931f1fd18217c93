"""Text to token ids and back, and the two streaming filters between sampled tokens and a client.

`TextTokenizer` wraps the `tokenizers` library and what `tokenizer_config.json` adds to it. `IncrementalDecoder`
turns a stream of ids into text, `StopMatcher` cuts that text at the first stop string.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster.common.text_format import one_line
from cluster.text.token_bytes import UNBOUNDED, drops_text, flat_steps, normalizes, source_bytes, token_bytes
from protos.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenizerError(UserError):
    """A tokenizer file is missing or unusable, or a text cannot be tokenised; one line for the user."""


class TextTokenizer:
    """The tokenizer of one model folder. Encoding releases the GIL; one instance may be used by several threads."""

    def __init__(self, definition: bytes, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._definition = definition
        self._tokenizer = Tokenizer.from_buffer(definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._layout: dict[str, Any] = json.loads(definition)
        self.chat_template = chat_template
        self.special_tokens = _named_tokens(config)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special_texts = tuple(token.content for token in added.values() if token.special)
        self._bos_id = self._tokenizer.token_to_id(self.special_tokens.get("bos_token", ""))
        wanted = config.get("add_bos_token")
        if wanted is None:  # then the post-processor of tokenizer.json decides
            wanted = self._bos_id is not None and self._tokenizer.encode("").ids[:1] == [self._bos_id]
        self.adds_bos = bool(wanted) and self._bos_id is not None

    @classmethod
    def open(cls, model_dir: Path | str) -> TextTokenizer:
        """Read `tokenizer.json` and, where present, `tokenizer_config.json` and the chat template of `model_dir`."""
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        try:
            definition = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror}): the model folder needs the fast tokenizer's file"
            ) from error
        config = _read_json(folder / "tokenizer_config.json")
        template = _chat_template(folder, config)
        try:
            return cls(definition, config, template)
        except Exception as error:  # the library raises bare Exception
            reason = one_line(error, 200)
            raise TokenizerError(f"{path}: not a usable tokenizer: {reason}: download the file again") from error

    def encode(
        self, text: str, add_special: bool = False, *, literal: bool = False, continues: bool = False
    ) -> list[int]:
        """Token ids of `text`. `add_special` puts the beginning-of-sequence token first if the model wants one.

        `literal` reads special tokens in `text` as ordinary characters, so that a document cannot end its own
        message. `continues` says that other tokens come before, so that no word-start mark is added.
        """
        source = self._literal_tokenizer if literal and self.has_special(text) else self._tokenizer
        try:
            ids = self._encode_after(source, text) if continues and self._marks_start else self._ids(source, text)
        except TypeError as error:  # lone surrogates, which JSON can carry
            raise TokenizerError("text: has lone surrogates (\\ud800 to \\udfff): must be valid Unicode") from error
        bos = [self._bos_id] if self._bos_id is not None and self.adds_bos and add_special else []
        if bos and ids[:1] != bos:
            ids[:0] = bos
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; ids outside the vocabulary are skipped."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        return text

    def has_special(self, text: str) -> bool:
        """Whether `text` spells a special token."""
        return any(special in text for special in self._special_texts)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary entry as stored (byte-level or with word-start marks); None for an unknown id."""
        entry: str | None = self._tokenizer.id_to_token(token_id)
        return entry

    @property
    def eos_id(self) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return token_id

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the decoder only joins the bytes of the tokens (GPT-2, Qwen and Llama 3 families)."""
        return [step["type"] for step in flat_steps(self._layout.get("decoder"), "decoders")] == ["ByteLevel"]

    @cached_property
    def longest_token_bytes(self) -> int:
        """An upper bound of the UTF-8 bytes of text that one token stands for.

        `UNBOUNDED` where text can disappear: unknown tokens, normalizers or pre-tokenizers that remove text.
        """
        canonical = normalizes(self._layout)
        if canonical is None or drops_text(self._layout):
            return UNBOUNDED
        added = {token["content"] for token in self._layout.get("added_tokens", [])}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = (token_bytes(t) if self.is_byte_level and t not in added else t.encode() for t in vocabulary)
        return max((source_bytes(piece, canonical) for piece in pieces), default=UNBOUNDED)

    def min_tokens(self, num_bytes: int) -> int:
        """The fewest tokens that `num_bytes` of UTF-8 text can have."""
        return -(-num_bytes // self.longest_token_bytes)

    @cached_property
    def _literal_tokenizer(self) -> Tokenizer:
        twin = Tokenizer.from_buffer(self._definition)  # a second one: the switch is not per call
        twin.no_truncation()
        twin.no_padding()
        twin.encode_special_tokens = True
        return twin

    @cached_property
    def _marks_start(self) -> bool:
        """Whether the tokenizer puts a space or a mark before the first word of any text."""
        return bool(
            any(step["type"] == "Prepend" for step in flat_steps(self._layout.get("normalizer"), "normalizers"))
            or any(
                step.get("prepend_scheme", "never") != "never" or step.get("add_prefix_space")
                for step in flat_steps(self._layout.get("pre_tokenizer"), "pretokenizers")
            )
        )

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
        # The fast batch call keeps no offsets: a third less time and memory for a document of 4 MB.
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    @staticmethod
    def _encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
        anchor = "x"
        encoding = tokenizer.encode(anchor + text, add_special_tokens=False)
        for index, (start, _stop) in enumerate(encoding.offsets):
            if start >= len(anchor):
                return list(encoding.ids[index:])
        return []


class IncrementalDecoder:
    """Text of a growing list of ids, piece by piece; the pieces and `flush()` join to `decode` of all ids.

    Never emits part of a character. The work for a token does not depend on how many came before.
    """

    _CONTEXT = 4  # visible tokens decoded again, so that spaces between words are right

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became certain with `token_id`; often empty inside a character of several tokens."""
        entry = self._tokenizer.token_text(token_id)
        if entry is None or (self._skip_special and self._tokenizer.is_special(token_id)):
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(token_bytes(entry))
        self._held.append(token_id)
        # A run of byte tokens is text only if the whole run is UTF-8, so it waits for its end.
        return "" if _BYTE_TOKEN.fullmatch(entry) else self._emit()

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character; the decoder starts anew."""
        rest = self._utf8.decode(b"", final=True) + (self._emit() if self._held else "")
        self._context.clear()
        return rest

    def _emit(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special=self._skip_special)
        text = self._tokenizer.decode(self._context + self._held, skip_special=self._skip_special)
        tail = [i for i in self._held if not _BYTE_TOKEN.fullmatch(self._tokenizer.token_text(i) or "")]
        self._context = (self._context + tail)[-self._CONTEXT :]
        self._held = []
        return text[len(before) :]


class StopMatcher:
    """Passes text on until the first stop string is complete; the stop string and what follows are dropped.

    Of several stop strings the one that ends first wins, then the longest; so pieces of any size give the same text.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if not all(stop_strings):
            raise UserError('stop: "": a stop string must have at least one character')
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that no stop string can claim any more, and whether a stop string was found."""
        if self.stopped:
            return "", True
        buffer = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return buffer[: min(found)[1]], True
        keep = min(self._longest - 1, len(buffer)) if self._stops else 0
        while keep > 0 and not any(stop.startswith(buffer[-keep:]) for stop in self._stops):
            keep -= 1
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], False

    def flush(self) -> str:
        """The withheld text of an output that ended without a stop string."""
        rest, self._held = self._held, ""
        return rest


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like: strings, or objects with a `content`."""
    named = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[key] = value
    return named


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not readable as JSON ({error}): download the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}: must be a JSON object")
    return value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template files win over the configuration; of several named templates, `default` is taken."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: not readable as UTF-8 text ({error}): download the file again") from error
    value = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise TokenizerError(f"{folder}: chat_template is a {kind}: must be text or a list of named templates")
    return value
