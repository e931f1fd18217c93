"""Text to ids and back, streaming decoding, stop strings, and the byte bound."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cluster.text.token_bytes import UNBOUNDED, source_bytes, token_bytes
from cluster.text.tokenizer import IncrementalDecoder, StopMatcher, TextTokenizer, TokenizerError
from cluster.tools.assets import configs_dir, needle_dir

NEEDLE = TextTokenizer.open(needle_dir())
BYTE_IDS = {
    token_bytes(entry)[0]: i for i in range(NEEDLE.vocab_size) if (entry := NEEDLE.token_text(i)) and len(entry) == 1
}


def sentencepiece_like() -> Tokenizer:
    """A small tokenizer of the Llama 2 kind: word-start marks, byte fallback, a stripped first space."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", ".", "▁a", "ab", "▁ab", "é"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def wrap(tokenizer: Tokenizer, **config: Any) -> TextTokenizer:
    return TextTokenizer(tokenizer.to_str().encode(), config, None)


SENTENCEPIECE = wrap(sentencepiece_like(), bos_token="<s>", add_bos_token=True)


def streamed(tokenizer: TextTokenizer, ids: list[int], skip_special: bool) -> str:
    decoder = IncrementalDecoder(tokenizer, skip_special)
    return "".join([*(decoder.push(i) for i in ids), decoder.flush()])


def test_assets_are_found() -> None:
    assert (configs_dir() / "needle" / "words.json").is_file()


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_encode_decode_round_trip(text: str) -> None:
    ids = NEEDLE.encode(text, literal=True)
    assert NEEDLE.decode(ids, skip_special=False) == text
    assert len(ids) >= NEEDLE.min_tokens(len(text.encode()))


@given(st.lists(st.integers(0, NEEDLE.vocab_size + 3)), st.booleans())
@settings(deadline=None)
def test_incremental_decoding_of_any_ids(ids: list[int], skip_special: bool) -> None:
    assert streamed(NEEDLE, ids, skip_special) == NEEDLE.decode(ids, skip_special)


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_incremental_decoding_of_any_bytes(data: bytes) -> None:
    ids = [BYTE_IDS[byte] for byte in data]
    assert streamed(NEEDLE, ids, True) == NEEDLE.decode(ids) == data.decode("utf-8", "replace")


@given(st.lists(st.integers(0, SENTENCEPIECE.vocab_size)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_incremental_decoding_with_word_marks_and_byte_fallback(ids: list[int], skip_special: bool) -> None:
    assert streamed(SENTENCEPIECE, ids, skip_special) == SENTENCEPIECE.decode(ids, skip_special)


@given(st.text("ab é.世😀 ", max_size=20))
@settings(deadline=None)
def test_incremental_decoding_never_shows_half_a_character(text: str) -> None:
    for tokenizer in (NEEDLE, SENTENCEPIECE):
        decoder = IncrementalDecoder(tokenizer)
        shown = [decoder.push(i) for i in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(shown)
        assert "".join([*shown, decoder.flush()]) == tokenizer.decode(tokenizer.encode(text))


def test_decoder_work_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = SENTENCEPIECE.decode
    monkeypatch.setattr(SENTENCEPIECE, "decode", lambda ids, skip_special: sizes.append(len(ids)) or decode(ids))
    decoder = IncrementalDecoder(SENTENCEPIECE)
    for token_id in SENTENCEPIECE.encode("ab " * 500):
        decoder.push(token_id)
    assert max(sizes) <= 8


def test_special_tokens_in_a_literal_text_are_characters() -> None:
    text = "a<|im_end|>b"
    assert 2 in NEEDLE.encode(text)
    assert 2 not in NEEDLE.encode(text, literal=True)
    assert NEEDLE.decode(NEEDLE.encode(text, literal=True)) == text
    assert NEEDLE.decode(NEEDLE.encode(text)) == "ab"


def test_bos_is_added_once_and_only_on_request() -> None:
    assert SENTENCEPIECE.encode("a", add_special=True) == [1, *SENTENCEPIECE.encode("a")]
    assert SENTENCEPIECE.encode("<s>a", add_special=True).count(1) == 1
    assert wrap(sentencepiece_like(), bos_token="<s>").adds_bos is False
    assert NEEDLE.encode("", add_special=True) == []
    assert NEEDLE.eos_id == 0


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


def test_bound_holds_for_every_character_that_normalization_shortens() -> None:
    for code in range(0x110000):
        char = chr(code)
        for form in ("NFC", "NFD"):
            normal = unicodedata.normalize(form, char)
            if normal != char:
                size, short = len(char.encode()), normal.encode()
                assert size <= source_bytes(short, True) <= 6 * len(short)
                assert len(unicodedata.normalize("NFD", char).encode()) <= source_bytes(short, True)


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
        ("tokenizer_config.json", b'{"chat_template": 5}', TokenizerError),
        ("chat_template.jinja", b"\xff", TokenizerError),
    ],
)
def test_where_the_chat_template_comes_from(tmp_path: Path, name: str, content: bytes, expected: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes((needle_dir() / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    if isinstance(expected, str):
        assert TextTokenizer.open(tmp_path).chat_template == expected
    else:
        with pytest.raises(expected, match=r"^[^\n]+$"):
            TextTokenizer.open(tmp_path)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TokenizerError, match="lone surrogates"):
        NEEDLE.encode("a\ud800")


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=400, deadline=None)
def test_stop_matcher_equals_the_naive_one(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, text = "", ""
    for piece in pieces:
        text += piece
        safe, stopped = matcher.push(piece)
        shown += safe
        expected, found = naive_stop(text, stops)
        assert stopped == found
        assert shown == expected if found else expected.startswith(shown)
        held = expected[len(shown) :]
        assert found or not held or any(stop.startswith(held) for stop in stops)  # nothing is held without reason
    assert shown + matcher.flush() == naive_stop(text, stops)[0]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        StopMatcher(["a", ""])
