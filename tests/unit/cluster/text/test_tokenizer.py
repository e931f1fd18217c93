"""Text to ids and back, files of a model folder, and the bound of bytes a token stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cluster.text.token_bytes import UNBOUNDED
from cluster.text.tokenizer import TextTokenizer, TokenizerError
from tests.support import paths
from tests.support.data.tokenizer_families import FAMILIES, word_piece
from tests.support.data.tokenizers import NEEDLE, SENTENCEPIECE, sentencepiece_like, wrap

TAKES_SPACE = {"added_tokens_decoder": {NEEDLE.vocab_size: {"content": "<user>", "normalized": False, "rstrip": True}}}


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_encode_decode_round_trip(text: str) -> None:
    ids = NEEDLE.encode(text, literal=True)
    assert NEEDLE.decode(ids, skip_special=False) == text
    assert len(ids) >= NEEDLE.min_tokens(len(text.encode()))


def test_special_tokens_in_a_literal_text_are_characters() -> None:
    text = "a<|im_end|>b"
    assert 2 in NEEDLE.encode(text)
    assert 2 not in NEEDLE.encode(text, literal=True)
    assert NEEDLE.decode(NEEDLE.encode(text, literal=True)) == text
    assert NEEDLE.decode(NEEDLE.encode(text)) == "ab"


def test_bos_is_added_once_and_only_on_request() -> None:
    assert SENTENCEPIECE.encode("a", add_special=True) == [1, *SENTENCEPIECE.encode("a")]
    assert SENTENCEPIECE.encode("<s>a", add_special=True).count(1) == 1
    assert wrap(sentencepiece_like(), bos_token="<s>").encode("a", add_special=True) == SENTENCEPIECE.encode("a")
    assert NEEDLE.encode("", add_special=True) == []


def test_a_continuation_gets_no_word_mark() -> None:
    whole = SENTENCEPIECE.encode("ab.ab")
    assert SENTENCEPIECE.encode("ab.") + SENTENCEPIECE.encode("ab", continues=True) == whole
    assert SENTENCEPIECE.encode("", continues=True) == []


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({}, 6),  # "<0x00>" as spelt: an upper bound is enough
        ({"normalizer": {"type": "Lowercase"}}, UNBOUNDED),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "aa"}, "content": "a"}}, UNBOUNDED),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}}, UNBOUNDED),
        ({"pre_tokenizer": {"type": "Whitespace"}}, UNBOUNDED),
        ({"byte_fallback": False}, UNBOUNDED),
    ],
)
def test_bound_is_given_up_where_text_can_vanish(change: dict[str, Any], bound: int) -> None:
    layout = json.loads(sentencepiece_like().to_str())
    for key, value in change.items():
        (layout["model"] if key in layout["model"] else layout)[key] = value
    tokenizer = TextTokenizer(json.dumps(layout).encode(), {}, None)
    assert tokenizer.longest_token_bytes == bound
    assert tokenizer.min_tokens(5_000_000) == -(-5_000_000 // bound)


def test_bound_of_the_needle_tokenizer() -> None:
    longest = max(len(NEEDLE.decode([i], skip_special=False).encode()) for i in range(NEEDLE.vocab_size))
    assert NEEDLE.longest_token_bytes == longest
    for num_bytes, fewest in [(0, 0), (1, 1), (longest - 1, 1), (longest, 1), (longest + 1, 2), (7 * longest + 1, 8)]:
        assert NEEDLE.min_tokens(num_bytes) == fewest


def test_added_tokens_that_take_in_white_space_have_no_bound_in_prompts() -> None:
    taking = TextTokenizer((paths.NEEDLE / "tokenizer.json").read_bytes(), TAKES_SPACE, None)
    assert len(taking.encode("<user>" + " " * 10_000)) == taking.min_tokens(10_006, literal=False) == 1
    assert len(taking.encode("<user>" + " " * 10_000, literal=True)) >= taking.min_tokens(10_006) > 100


def test_bound_with_nfc_is_wider() -> None:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert wrap(tokenizer).longest_token_bytes == 1
    tokenizer.normalizer = normalizers.NFC()
    wide = wrap(tokenizer)
    assert wide.longest_token_bytes == 6
    assert len(wide.encode("\u212a" * 7)) >= wide.min_tokens(len(("\u212a" * 7).encode()))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"{", b"\xff\xfe", b"[]", b'{"model": 3}'])
def test_unusable_tokenizer_files_are_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"^.*tokenizer\.json: [^\n]+$"):
        TextTokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer_config.json", b'{"chat_template": "one"}', "one"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": "two"}]}', "two"),
        ("chat_template.json", b'{"chat_template": "three"}', "three"),
        ("chat_template.jinja", b"four", "four"),
        ("tokenizer_config.json", b"[]", TokenizerError),
        ("tokenizer_config.json", b"{", TokenizerError),
        ("tokenizer_config.json", b"[" * 100_000, TokenizerError),
        ("tokenizer_config.json", b'{"chat_template": 5}', TokenizerError),
        ("chat_template.jinja", b"\xff", TokenizerError),
    ],
)
def test_where_the_chat_template_comes_from(tmp_path: Path, name: str, content: bytes, expected: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes((paths.NEEDLE / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, str):
        assert TextTokenizer.open(tmp_path).chat_template == expected
    else:
        with pytest.raises(expected, match=r"^[^\n]+$"):
            TextTokenizer.open(tmp_path)


def test_a_panic_of_the_library_is_one_line_too(tmp_path: Path) -> None:
    layout = json.loads(sentencepiece_like().to_str())
    layout["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(TokenizerError, match=r"\A[^\n]*not a usable tokenizer: Precompiled: [^\n]+\Z"):
        TextTokenizer.open(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_files_are_measured_before_they_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((paths.NEEDLE / "tokenizer.json").read_bytes())
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(TokenizerError, match=rf"\A[^\n]*{name}: 1099511627776 bytes: must be at most \d+\Z"):
        TextTokenizer.open(tmp_path)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TokenizerError, match="lone surrogates"):
        NEEDLE.encode("a\ud800")


def test_added_tokens_that_are_spelt_once_they_are_normalized() -> None:
    tokenizer = Tokenizer.from_str((paths.NEEDLE / "tokenizer.json").read_text())
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    assert list(wrap(tokenizer).find_respelt("<TOOL>")) == []
    tokenizer.normalizer = normalizers.Lowercase()
    assert list(wrap(tokenizer).find_respelt("é<tool> <TOOL>")) == [(8, 14)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_vocabulary_joins_to_the_text(family: str) -> None:
    tokenizer = wrap(FAMILIES[family]())
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == tokenizer.vocab_size
    for text in ("a b ab", "xé é", "<s> 😀 <tool>", "tx  ab\n"):
        ids = tokenizer.encode(text, literal=True, continues=True)
        assert b"".join(vocabulary[token] for token in ids) == text.encode()


def test_vocabulary_of_another_kind() -> None:
    with pytest.raises(TokenizerError, match="its decoder is neither"):
        wrap(word_piece()).vocabulary()
    assert NEEDLE.added_id("<|im_start|>") == 1
    assert NEEDLE.added_id("a") is None
