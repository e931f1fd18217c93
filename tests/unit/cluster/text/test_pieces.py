"""Texts cut into pieces have the ids of the whole, for every tokenizer that is cut; the others are not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.text.pieces import PIECE_CHARS, TextCutter
from cluster.text.tokenizer import TextPart, TextTokenizer, TokenizerError
from tests.support import paths
from tests.support.data.tokenizer_families import ADDED, FAMILIES, QWEN_SPLIT, marks_alone, word_piece
from tests.support.data.tokenizers import NEEDLE, wrap

TOKENIZERS = {name: wrap(make()) for name, make in FAMILIES.items()} | {"needle": NEEDLE}
PIECES = st.sampled_from(
    ["a", "ab", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "1", "42", "1234567", ".", ",\n", "'s", "'",
     "\u2019ll", "-", "/", "é", "e\u0301", "\u0301", "ß", "ñ", "漢", "字。", "。", "，", "か", "한국", "ह", "हि",
     "😀", "x", "<", "t>", "\u0149", "▁", *(token.content for token in ADDED)]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=20).map("".join)
family = pytest.mark.parametrize("name", TOKENIZERS)


@contextmanager
def pieces_of(tokenizer: TextTokenizer, size: int) -> Iterator[None]:
    tokenizer.cutter.size = size
    try:
        yield
    finally:
        tokenizer.cutter.size = PIECE_CHARS


@family
@given(TEXTS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_pieces_have_the_ids_of_the_whole(name: str, text: str, size: int) -> None:
    assume(not marks_alone(name, text))
    tokenizer = TOKENIZERS[name]
    kinds: list[dict[str, Any]] = [{}, {"literal": True}, {"continues": True}, {"literal": True, "continues": True}]
    whole = [tokenizer.encode(text, **kind) for kind in kinds]
    with pieces_of(tokenizer, size):
        assert "".join(tokenizer.cutter.pieces(text)) == text
        assert [tokenizer.encode(text, **kind) for kind in kinds] == whole


@family
@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_pieces_of_mixed_parts(name: str, head: str, document: str, tail: str) -> None:
    assume(not marks_alone(name, head + tail))
    tokenizer = TOKENIZERS[name]
    parts = [TextPart(head), TextPart(document, literal=True), TextPart(tail)]
    whole = tokenizer.encode_parts(parts)
    with pieces_of(tokenizer, 2):
        assert tokenizer.encode_parts(parts) == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_cut_where_they_end(name: str) -> None:
    cutter = TextCutter(json.loads(FAMILIES[name]().to_str()), 4)
    assert list(cutter.pieces("aaaaaaa bb cccc dd")) == ["aaaaaaa", " bb cccc", " dd"]
    assert list(cutter.pieces("a" * 100)) == ["a" * 100]


def test_a_long_text_is_never_encoded_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    text = gzip.decompress((paths.NEEDLE / "book.txt.gz").read_bytes()).decode()[:600_000]
    with pieces_of(NEEDLE, 1 << 30):
        whole = NEEDLE.encode(text)
    sizes = [len(piece) for piece in NEEDLE.cutter.pieces(text)]
    assert max(sizes) < PIECE_CHARS + 100
    assert NEEDLE.encode(text) == NEEDLE.encode(text, literal=True) == whole


def test_a_text_of_too_many_tokens_is_given_up_early() -> None:
    text = "a b " * 500_000
    with pytest.raises(
        TokenizerError, match=r"\Aprompt: at least \d+ tokens, max_model_len is 4096: shorten the text\Z"
    ):
        NEEDLE.encode(text, literal=True, max_model_len=4096)
    assert NEEDLE.encode(text[:4000], max_model_len=4096) == NEEDLE.encode(text[:4000])


def split(pattern: str, **more: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | more


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
VOCAB = {"a": 0, "▁": 1, "▁a": 2}


@pytest.mark.parametrize(
    ("normalizer", "splits", "vocab", "cuts"),
    [
        ("NFC", [split(QWEN_SPLIT), BYTES], VOCAB, True),
        (None, [{"type": "Digits"}, split(QWEN_SPLIT), BYTES], VOCAB, True),
        (None, [BYTES | {"use_regex": True}], VOCAB, True),
        (None, [METASPACE], VOCAB, True),
        ("NFD", [split(QWEN_SPLIT), BYTES], VOCAB, False),
        ("Lowercase", [split(QWEN_SPLIT), BYTES], VOCAB, False),
        (None, [split(QWEN_SPLIT + r"|(?<=a) b"), BYTES], VOCAB, False),
        (None, [split(r"\p{L}+ \p{L}+"), BYTES], VOCAB, False),
        (None, [split(QWEN_SPLIT, behavior="MergedWithNext"), BYTES], VOCAB, False),
        (None, [split(r"\p{N}{1,3}"), BYTES], VOCAB, False),  # leaves words together
        (None, [BYTES], VOCAB, False),
        (None, [METASPACE], VOCAB | {"a▁": 3}, False),  # merges across words
        (None, [METASPACE], {"a": 0}, False),
        (None, [], VOCAB, False),
        (None, [{"type": "WhitespaceSplit"}, METASPACE], VOCAB, False),
        (None, [{"type": "BertPreTokenizer"}], VOCAB, False),
    ],
)
def test_where_texts_are_cut(
    normalizer: str | None, splits: list[dict[str, Any]], vocab: dict[str, int], cuts: bool
) -> None:
    layout = {
        "normalizer": normalizer and {"type": normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "model": {"type": "BPE", "vocab": vocab},
    }
    assert len(list(TextCutter(layout, 1).pieces("a a a"))) == (3 if cuts else 1)


def test_added_tokens_with_spaces_are_not_cut() -> None:
    tokenizer = word_piece()
    layout = json.loads(FAMILIES["gpt-2"]().to_str())
    layout["added_tokens"] = [{"content": "a b", "rstrip": False}]
    assert list(TextCutter(layout, 1).pieces("a b a", literal=False)) == ["a b a"]
    assert list(TextCutter(layout, 1).pieces("a b a")) == ["a", " b", " a"]
    layout["added_tokens"] = [{"content": "user", "rstrip": True}]  # takes in the space behind it
    assert list(TextCutter(layout, 1).pieces("a user b a", literal=False)) == ["a", " user b", " a"]
    assert wrap(tokenizer).cutter.cuts(1 << 30, literal=True) is False
