"""Derive the tokenizers that read literal text: none of the tokens that were added to the vocabulary can come out."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from enum import IntEnum
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from cluster.text.token_bytes import BYTE_LEVEL_ALPHABET, flatten_steps

_EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
_BYTE_ENTRIES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class Place(IntEnum):
    """What comes before a piece of text, which decides where the tokenizer puts a word-start mark or space."""

    INSIDE = 0  # other text: never a mark
    AFTER_NORMALIZED = 1  # an added token that is looked for in normalized text
    AFTER_ADDED = 2  # any other added token
    START = 3  # nothing


class LiteralTokenizers:
    """A tokenizer without its added tokens, one for each place that a text can have in a prompt.

    The texts of added tokens, special or not, are ordinary characters. An entry of the model's own vocabulary that is
    an added token too is kept only where its text has no other spelling, so that no character is lost; the mark of
    unknown characters stays too, for unknown characters. White space at the ends is never stripped.
    """

    def __init__(self, tokenizer: Tokenizer, layout: Mapping[str, Any]) -> None:
        """Keep what is needed; `layout` is the content of `tokenizer.json`."""
        self._tokenizer = tokenizer
        self._layout = layout
        self._at: dict[tuple[Place, bool], Tokenizer] = {}

    def at(self, place: Place, literal: bool = True) -> Tokenizer:
        """Return the tokenizer for text at `place`; not `literal`: without added tokens, but with the whole model."""
        key = place, literal
        if key not in self._at:
            self._at[key] = self._with_model(self._model if literal else self._tokenizer.model, place)
        return self._at[key]

    def find_added(self, text: str, continues: bool) -> Iterator[tuple[AddedToken, int, int]]:
        """Yield the added tokens spelt in `text` with their start and end, white space that they take in included.

        Args:
            continues: other text comes before, so that a mark that the normalizer puts first is not part of a token.
        """
        before = "." if continues else ""  # takes the mark
        encoding = self._finder.encode(before + text, add_special_tokens=False)
        added = self._finder.get_added_tokens_decoder()
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in added:
                yield added[token_id], start - len(before), end - len(before)

    @cached_property
    def _finder(self) -> Tokenizer:
        """The added tokens alone, with ids of their own: whatever is between them is one unknown word."""
        unknown = secrets.token_hex(16)
        tokenizer = Tokenizer(WordLevel({unknown: 0}, unk_token=unknown))
        tokenizer.normalizer = self._tokenizer.normalizer
        tokenizer.add_tokens(list(self._tokenizer.get_added_tokens_decoder().values()))
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        """The model without the entries that are added tokens; most have none and are shared, not copied."""
        needed = _byte_entries(self._layout)
        texts = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        whole = self._tokenizer.model
        own = {i: text for i, text in texts.items() if text not in needed and whole.id_to_token(i) is not None}
        while own:
            model = _load_model(_without_entries(self._layout["model"], own))
            tokenizer = self._with_model(model, Place.INSIDE)
            lost = {i for i, text in own.items() if not _has_spelling(tokenizer, text, self._layout["model"])}
            if not lost:
                return model
            shortest = min(len(own[i]) for i in lost)  # the others may be spelt with these
            own = {i: text for i, text in own.items() if i not in lost or len(text) > shortest}
        return whole

    def _with_model(self, model: Any, place: Place) -> Tokenizer:
        definition: dict[str, Any] = {"added_tokens": [], "model": _EMPTY_MODEL, "decoder": self._layout.get("decoder")}
        tokenizer = Tokenizer.from_str(json.dumps(definition | _at_place(self._layout, place)))
        tokenizer.model = model
        return tokenizer


def _unknown_id(model: Mapping[str, Any]) -> int | None:
    """Return the id that a model of `tokenizer.json` gives for a character it does not know; None if it has none."""
    if isinstance(model.get("vocab"), list):  # Unigram
        unknown: int | None = model.get("unk_id")
        return unknown
    return next((i for text, i in model["vocab"].items() if text == model.get("unk_token")), None)


def _load_model(model: Mapping[str, Any]) -> Any:
    return Tokenizer.from_str(json.dumps({"added_tokens": [], "model": model})).model


def _at_place(layout: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return normalizer and pre-tokenizer as they work on text at `place`."""
    normalizers, splits = (flatten_steps(layout.get(key)) for key in ("normalizer", "pre_tokenizer"))
    gone = {"Strip"} if place >= Place.AFTER_ADDED else {"Strip", "Prepend"}
    normalizers = [step for step in normalizers if step["type"] not in gone]
    if splits:  # behind a first one that splits, marks stand for the white space that it drops
        splits = [_marked_at(splits[0], place), *splits[1:]]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
    }


def _marked_at(step: dict[str, Any], place: Place) -> dict[str, Any]:
    """Return the first pre-tokenizer without the mark or space before the first word if there is none at `place`."""
    if step["type"] == "Metaspace":
        keeps = place is Place.START or (place is not Place.INSIDE and step.get("prepend_scheme") != "first")
        return step if keeps else {**step, "prepend_scheme": "never", "add_prefix_space": False}
    return {**step, "add_prefix_space": False} if step.get("add_prefix_space") and place is Place.INSIDE else step


def _byte_entries(layout: Mapping[str, Any]) -> frozenset[str]:
    """Return the entries that stand for single bytes, out of which every other text is spelt."""
    steps = flatten_steps(layout.get("normalizer")) + flatten_steps(layout.get("pre_tokenizer"))
    if any(step["type"] == "ByteLevel" for step in steps):
        return BYTE_LEVEL_ALPHABET
    return _BYTE_ENTRIES if layout["model"].get("byte_fallback") else frozenset()


def _without_entries(model: Mapping[str, Any], entries: Mapping[int, str]) -> dict[str, Any]:
    """Return the model with `entries` (id to text) under names that no text can spell, and no merge that makes them.

    Renamed, not removed: all ids stay as they are, and the model can still give its unknown token.
    """
    secret = secrets.token_hex(16)

    def renamed(text: str, token_id: int) -> str:
        return f"{secret} {token_id}" if entries.get(token_id) == text else text

    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of text and score, in the order of ids
        return {**model, "vocab": [[renamed(text, i), score] for i, (text, score) in enumerate(vocab)]}
    changed = {**model, "vocab": {renamed(text, i): i for text, i in vocab.items()}}
    if (unknown := model.get("unk_token")) is not None and unknown in vocab:
        changed["unk_token"] = renamed(unknown, vocab[unknown])
    if "merges" in model:
        prefix, gone = model.get("continuing_subword_prefix") or "", set(entries.values())
        changed["merges"] = [merge for merge in model["merges"] if gone.isdisjoint(_merge_texts(merge, prefix))]
    return changed


def _merge_texts(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """Return the two parts of a merge, which old files write as one text, and what they become."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def _has_spelling(tokenizer: Tokenizer, text: str, model: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer has tokens, none of them unknown, for every visible character of `text`."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    covered = {at for start, end in encoding.offsets for at in range(start, end)}
    visible = all(at in covered or char.isspace() for at, char in enumerate(text))
    return bool(encoding.ids) and visible and _unknown_id(model) not in encoding.ids
