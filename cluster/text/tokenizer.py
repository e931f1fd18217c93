"""Turn text into token ids and back: the `tokenizers` library and what `tokenizer_config.json` adds to it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster.common.text_format import one_line
from cluster.text.gguf_tokenizer import read_tokenizer
from cluster.text.literal_tokenizer import LiteralTokenizers, Place
from cluster.text.pieces import TextCutter
from cluster.text.special_tokens import add_declared_tokens, named_tokens, with_legacy_files
from cluster.text.templates.files import read_chat_template
from cluster.text.token_bytes import is_byte_level, longest_token_bytes, piece_bytes, token_bytes
from protos.errors import UserError
from protos.model.files import is_gguf

_MAX_FILE_BYTES = 1 << 28  # of tokenizer.json and its like


class TokenizerError(UserError):
    """A tokenizer file is missing or unusable, or a text cannot be tokenised; one line for the user."""


class TooManyTokens(TokenizerError):
    """A text was given up because it has more tokens than the context."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of a prompt. In a literal one (a document, a question, a message) added tokens are characters."""

    text: str
    literal: bool = False


class TextTokenizer:
    """The tokenizer of one model folder. Encoding releases the GIL; one instance may be used by several threads."""

    def __init__(self, definition: bytes, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._tokenizer = _load(definition)
        self._definition_hash = hashlib.sha256(definition).digest()
        add_declared_tokens(self._tokenizer, config)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._layout: dict[str, Any] = json.loads(definition)
        self._layout["added_tokens"] = [token.__getstate__() for token in self._added.values()]
        self._literal = LiteralTokenizers(self._tokenizer, self._layout)
        self.cutter = TextCutter(self._layout)
        self.is_byte_level = is_byte_level(self._layout)
        self.chat_template = chat_template
        self.special_tokens = named_tokens(config)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._id_of = {token.content: i for i, token in self._added.items()}
        self.added_texts = tuple(self._id_of)
        eos = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        self.end_ids = frozenset(() if eos is None else (eos,))
        self._prefix_ids = _prefix_ids(self._tokenizer)

    @classmethod
    def open(cls, model_dir: Path | str, chat_template: str | None = None) -> TextTokenizer:
        """Read `tokenizer.json` and, where present, the other files of `model_dir` about tokens, and the chat template.

        `model_dir` may be a GGUF file, which holds all of it.

        Raises TokenizerError: a file is missing or unusable.
        """
        folder = Path(model_dir)
        path = folder if is_gguf(folder) else folder / "tokenizer.json"
        try:
            definition, files = read_tokenizer(folder) if is_gguf(folder) else _read_files(folder)
            beside = is_gguf(folder) and (chat_template or "").endswith(".jinja")
            template = read_chat_template(folder.parent if beside else folder, files[0], chat_template)
        except TokenizerError:
            raise
        except UserError as error:
            raise TokenizerError(str(error)) from error
        try:
            return cls(definition, with_legacy_files(*files), template)
        except UserError as error:
            raise TokenizerError(f"{path}: {error}") from error
        except Exception as error:  # the library raises bare Exception
            problem = f"not a usable tokenizer: {one_line(error, 200)}: download the file again"
            raise TokenizerError(f"{path}: {problem}") from error

    def encode(
        self, text: str, add_special: bool = False, *, literal: bool = False, continues: bool = False,
        max_model_len: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Return the token ids of `text`.

        Args:
            add_special: put first what the post-processor of tokenizer.json does, mostly a beginning-of-sequence token.
            literal: read added tokens, special or not, as ordinary characters, so that a document can neither end its
                own message nor open a reasoning block.
            continues: other tokens come before, so no word-start mark is added.
            max_model_len: give up a text that is sure to have more tokens than that.

        Raises:
            TokenizerError: the text has lone surrogates, or was given up.
        """
        parts = [TextPart(text, literal)]
        return self.encode_parts(parts, add_special, continues=continues, max_model_len=max_model_len)

    def encode_parts(
        self, parts: Iterable[TextPart], add_special: bool = False, *, continues: bool = False,
        max_model_len: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Return the token ids of a prompt made of several parts; its seams are tokenised as those of one text.

        Added tokens come out of parts that are not literal alone, never across a seam. Otherwise as `encode`.
        """
        parts = list(parts)
        limit = sys.maxsize if max_model_len is None else max_model_len
        is_mixed = continues or any(part.literal for part in parts)
        try:
            if is_mixed or self.cutter.cuts(sum(len(part.text) for part in parts), literal=False):
                ids = self._encode_mixed(parts, Place.INSIDE if continues else Place.START, limit)
            else:
                ids = _encode(self._tokenizer, "".join(part.text for part in parts))
        except TypeError as error:  # lone surrogates, which JSON can carry
            raise TokenizerError("text: has lone surrogates (\\ud800 to \\udfff): must be valid Unicode") from error
        if add_special and ids[: len(self._prefix_ids)] != self._prefix_ids:
            ids = self._prefix_ids + ids
        return ids

    def place_after(self, head: str) -> Place:
        """Return the place that literal text has behind the beginning of a prompt."""
        if not head:
            return Place.START
        place, end = Place.INSIDE, 0
        for token, _, end in self._literal.find_added(head, continues=False):  # noqa: B007
            place = Place.AFTER_NORMALIZED if token.normalized else Place.AFTER_ADDED
        return Place.INSIDE if head[end:] else place

    def encode_literal(self, text: str, place: Place, max_model_len: int) -> list[int]:
        """Return the ids of literal text at `place`, tokenised by itself: its seams to other text are ends of tokens.

        Raises as `encode`.
        """
        ids: list[int] = []
        try:
            self._encode_stretch([TextPart(text, literal=True)], place, ids, max_model_len)
        except TypeError as error:
            raise TokenizerError("text: has lone surrogates (\\ud800 to \\udfff): must be valid Unicode") from error
        return ids

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of all that the ids of literal text depend on."""
        added = json.dumps(self._layout["added_tokens"], sort_keys=True).encode()
        return hashlib.sha256(self._definition_hash + added).digest()

    def _encode_mixed(self, parts: Sequence[TextPart], place: Place, limit: int) -> list[int]:
        """Encode what is between the added tokens of the parts that are not literal, each such stretch as one text."""
        ids: list[int] = []
        stretch: list[TextPart] = []
        for part in parts:
            if part.literal:
                stretch.append(part)
                continue
            for piece in self.cutter.pieces(part.text, literal=False):
                begin, inside = 0, place is Place.INSIDE or any(before.text for before in stretch)
                for token, start, end in self._literal.find_added(piece, inside):
                    self._encode_stretch([*stretch, TextPart(piece[begin:start])], place, ids, limit)
                    ids.append(self._id_of[token.content])
                    place = Place.AFTER_NORMALIZED if token.normalized else Place.AFTER_ADDED
                    stretch, begin = [], end
                stretch.append(TextPart(piece[begin:]))
        self._encode_stretch(stretch, place, ids, limit)
        return ids

    def _encode_stretch(self, parts: Sequence[TextPart], place: Place, ids: list[int], limit: int) -> None:
        """Append the ids of one text; raises TokenizerError when they are more than `limit` before its end."""
        is_literal = any(part.literal and part.text for part in parts)
        for piece in self.cutter.pieces("".join(part.text for part in parts)):
            if len(ids) > limit:
                problem = f"at least {len(ids)} tokens, max_model_len is {limit}"
                raise TooManyTokens(f"prompt: {problem}: shorten the text")
            ids += _encode(self._literal.at(place, is_literal), piece)
            place = Place.INSIDE

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; ids outside the vocabulary are skipped."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))

    def spells_added(self, text: str) -> bool:
        """Return whether `text` spells an added token, special or not, as it stands or once it is normalized."""
        if any(added in text for added in self.added_texts):
            return True
        normalizer = self._tokenizer.normalizer
        normalized = [token.content for token in self._added.values() if token.normalized]
        if normalizer is None or not normalized:
            return False
        text = normalizer.normalize_str(text)
        return any(normalizer.normalize_str(added) in text for added in normalized)

    def find_respelt(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of the added tokens in a text that it spells only once it is normalized."""
        if self._tokenizer.normalizer is None or not any(token.normalized for token in self._added.values()):
            return
        for token, start, end in self._literal.find_added(text, continues=False):
            if text[start:end].strip() != token.content.strip():
                yield start, end

    def vocabulary(self) -> list[bytes]:
        """Return the bytes that each id stands for behind other tokens; b"" for ids without an entry.

        Raises TokenizerError: the decoder does more than join the tokens.
        """
        steps = json.dumps(self._layout.get("decoder"))
        if not self.is_byte_level and not ("ByteFallback" in steps or "Metaspace" in steps):
            raise TokenizerError("tokenizer.json: its decoder is neither byte-level nor one of word-start marks")
        convert = token_bytes if self.is_byte_level else piece_bytes
        entries = (self.id_to_token(token) for token in range(self.vocab_size))
        return [b"" if entry is None else convert(entry) for entry in entries]

    def added_id(self, text: str) -> int | None:
        """Return the id of an added token, special or not; None for other texts."""
        return self._id_of.get(text)

    def is_special(self, token_id: int) -> bool:
        """Return whether the id is a special token such as `<|im_end|>`."""
        return token_id in self._special_ids

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary entry as stored (byte-level or with word-start marks); None for an unknown id."""
        entry: str | None = self._tokenizer.id_to_token(token_id)
        return entry

    @cached_property
    def longest_token_bytes(self) -> int:
        """Upper bound of the UTF-8 bytes of text that one token stands for."""
        return longest_token_bytes(self._layout, self._tokenizer.get_vocab(with_added_tokens=True))

    def min_tokens(self, num_bytes: int, literal: bool = True) -> int:
        """Return the fewest tokens that `num_bytes` of UTF-8 text can have, literal text or any."""
        if not literal and any(token.lstrip or token.rstrip for token in self._added.values()):
            return min(num_bytes, 1)  # one token may take in any amount of white space
        return -(-num_bytes // self.longest_token_bytes)


def _load(definition: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(definition)
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of the library's Rust code; no Exception
            raise ValueError(str(error)) from error
        raise
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # The fast batch call keeps no offsets: a third less time and memory for a document of 4 MB.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the post-processor puts before any text."""
    alone, processed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    ends = range(len(processed) - len(alone) + 1)
    return next((processed[:end] for end in ends if processed[end : end + len(alone)] == alone), [])


def _read_files(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Return `tokenizer.json` of a folder, and what its other files say, the newest first. Raises TokenizerError."""
    path = folder / "tokenizer.json"
    try:
        definition = _read(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}): the model folder needs the fast tokenizer's file"
        raise TokenizerError(f"{path}: {problem}") from error
    files = [f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "added_tokens")]
    return definition, [_read_json(folder / name) for name in files]


def _read(path: Path) -> bytes:
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: {size} bytes: must be at most {_MAX_FILE_BYTES}")
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except TokenizerError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not readable as JSON ({error}): download the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}: must be a JSON object")
    return value
