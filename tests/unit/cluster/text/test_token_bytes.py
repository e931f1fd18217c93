"""Bytes of byte-level tokens, and the bound of text that becomes a piece."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from cluster.text.token_bytes import flatten_steps, has_canonical_normalizer, is_lossy, max_source_bytes, token_bytes


def test_bound_holds_for_every_character_that_normalization_shortens() -> None:
    for code in range(0x110000):
        char = chr(code)
        for form in ("NFC", "NFD"):
            normal = unicodedata.normalize(form, char)
            if normal != char:
                size, short = len(char.encode()), normal.encode()
                assert size <= max_source_bytes(short, True) <= 6 * len(short)
                assert len(unicodedata.normalize("NFD", char).encode()) <= max_source_bytes(short, True)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [("a", b"a"), ("Ġa", b" a"), ("Ċ", b"\n"), ("Ã©", "é".encode()), ("Ā", b"\0"), ("世", "世".encode()), ("", b"")],
)
def test_token_bytes(entry: str, expected: bytes) -> None:
    assert token_bytes(entry) == expected


@pytest.mark.parametrize(
    ("piece", "canonical", "size"),
    [(b"abc", False, 3), (b"abc", True, 3), (b"K;", True, 5), ("é".encode(), True, 5), (b"\xc3", True, 6)],
)
def test_max_source_bytes(piece: bytes, canonical: bool, size: int) -> None:
    assert max_source_bytes(piece, canonical) == size


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        (None, False),
        ({"type": "NFC"}, True),
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFD"}]}, True),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, False),
        ({"type": "Replace", "pattern": {"String": "aa"}, "content": "a"}, None),
        ({"type": "Lowercase"}, None),
    ],
)
def test_canonical_normalizers(normalizer: dict[str, Any] | None, expected: bool | None) -> None:
    assert has_canonical_normalizer({"normalizer": normalizer}) is expected


def test_nested_steps_are_flattened() -> None:
    inner = {"type": "Sequence", "decoders": [{"type": "A"}, {"type": "B"}]}
    assert [s["type"] for s in flatten_steps({"type": "Sequence", "decoders": [inner, {"type": "C"}]})] == [
        "A", "B", "C",
    ]  # fmt: skip
    assert flatten_steps(None) == []


@pytest.mark.parametrize(
    ("change", "lossy"),
    [
        ({}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, True),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Removed"}}, True),
        ({"added_tokens": [{"lstrip": True, "rstrip": False}]}, False),
        ({"model": {"type": "Unigram", "vocab": {}}}, True),
        ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True}}, True),
    ],
)
def test_lossy_tokenizers(change: dict[str, Any], lossy: bool) -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    assert is_lossy({"model": {"type": "BPE", "vocab": vocab, "byte_fallback": True}} | change) is lossy
