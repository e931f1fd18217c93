"""Bound the bytes of text that a token can stand for, from the definition in `tokenizer.json`.

The bound lets an over-long document be refused before it is tokenised, so it has to hold for every text.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

UNBOUNDED = sys.maxsize  # for tokenizers in which one token may stand for any amount of text
# The only characters whose canonical form is ASCII, hence shorter: KELVIN SIGN, GREEK QUESTION MARK, VARIA.
_NFC_ASCII_BYTES = {"K": 3, ";": 2, "`": 3}
# Byte-level BPE (GPT-2) writes printable bytes as themselves, the others as characters from U+0100 up.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTE_ENTRY = re.compile(r"<0x[0-9A-F]{2}>")
BYTE_LEVEL_ALPHABET = frozenset(_BYTE_OF)


def token_bytes(entry: str) -> bytes:
    """Return the bytes of a byte-level vocabulary entry; one with other characters (an added token) is plain text."""
    if all(char in _BYTE_OF for char in entry):
        return bytes(_BYTE_OF[char] for char in entry)
    return entry.encode()


def piece_bytes(entry: str) -> bytes:
    """Return the bytes of a vocabulary entry with word-start marks and byte tokens (Llama 2, Mistral)."""
    return bytes([int(entry[3:5], 16)]) if _BYTE_ENTRY.fullmatch(entry) else entry.replace("▁", " ").encode()


def max_source_bytes(piece: bytes, canonical: bool) -> int:
    """Return the most bytes of text that become `piece`: its size, more where canonical normalization shortens text.

    A character that normalizes to other characters has at most 4 bytes for each that is not ASCII, and then some
    of 3; in a piece that starts or ends inside a character, 6 for each byte covers every case.
    """
    if not canonical:
        return len(piece)
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return 6 * len(piece)
    return sum(_NFC_ASCII_BYTES.get(c, 1) if c.isascii() else 4 for c in unicodedata.normalize("NFD", text))


def longest_token_bytes(layout: Mapping[str, Any], vocabulary: Iterable[str]) -> int:
    """Return an upper bound of the UTF-8 bytes of text that one token of `tokenizer.json` stands for.

    White space that an added token takes in does not count: in literal text there are none.

    `UNBOUNDED` where text can disappear: unknown tokens, normalizers or pre-tokenizers that remove text.
    """
    canonical = has_canonical_normalizer(layout)
    if canonical is None or is_lossy(layout):
        return UNBOUNDED
    plain = {token["content"] for token in layout.get("added_tokens", [])} if is_byte_level(layout) else set(vocabulary)
    pieces = (entry.encode() if entry in plain else token_bytes(entry) for entry in vocabulary)
    return max((max_source_bytes(piece, canonical) for piece in pieces), default=UNBOUNDED)


def is_byte_level(layout: Mapping[str, Any]) -> bool:
    """Return whether the decoder only joins the bytes of the tokens (GPT-2, Qwen and Llama 3 families)."""
    return [step["type"] for step in flatten_steps(layout.get("decoder"))] == ["ByteLevel"]


def has_canonical_normalizer(layout: Mapping[str, Any]) -> bool | None:
    """Return whether text is canonically normalized (NFC, NFD); None if text may shrink without a known bound."""
    canonical = False
    for step in flatten_steps(layout.get("normalizer")):
        pattern = step.get("pattern", {}).get("String", "") if step["type"] == "Replace" else ""
        grows = pattern and len(step["content"].encode()) >= len(pattern.encode())
        if step["type"] in ("NFC", "NFD"):
            canonical = True
        elif step["type"] != "Prepend" and not grows:
            return None
    return canonical


def is_lossy(layout: Mapping[str, Any]) -> bool:
    """Return whether some text may leave no token: removed separators, unknown characters, swallowed spaces."""
    model, vocabulary = layout["model"], layout["model"].get("vocab", {})
    keeps = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"}
    steps = flatten_steps(layout.get("pre_tokenizer"))
    if any(step["type"] not in keeps or step.get("behavior") == "Removed" for step in steps) or model.get(
        "type"
    ) not in (None, "BPE"):
        return True
    if any(step["type"] == "ByteLevel" for step in steps):
        return not all(char in vocabulary for char in _BYTE_OF)
    return not (model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)))


def flatten_steps(section: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the parts of a normalizer, pre-tokenizer or decoder, nested sequences flattened."""
    if section is None or section["type"] != "Sequence":
        return [section] if section else []
    parts = next(value for key, value in section.items() if key != "type")
    return [step for part in parts for step in flatten_steps(part)]
