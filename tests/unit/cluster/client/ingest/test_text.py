"""Encodings: facts before guesses, every text comes back, binary files are told."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.client.ingest.text import NotText, decode, is_binary

WORDS = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn"]), min_size=1)
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=8)


@given(WORDS)
def test_utf8_is_taken_as_it_is(text: str) -> None:
    assert decode(text.encode()) == (text, "utf-8") or text.startswith("\ufeff")
    assert decode(codecs.BOM_UTF8 + text.encode()) == (text, "utf-8-sig")


@given(WORDS, st.sampled_from(["utf-16", "utf-32"]), st.sampled_from(["le", "be"]))
def test_marks_decide(text: str, wide: str, order: str) -> None:
    mark = getattr(codecs, f"BOM_{wide.replace('-', '').upper()}_{order.upper()}")
    found = decode(mark + text.encode(f"{wide}-{order}"))
    # a text of UTF-16 that begins with a zero looks like UTF-32, and no text does
    assert found == (text, wide)


@given(ASCII, st.sampled_from(["utf-16-le", "utf-16-be"]))
def test_utf16_without_a_mark(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == (text, encoding)


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("Die Würde des Menschen ist unantastbar.", "latin-1", "latin-1"),
        ("L'été dernier, « nous » avons été à la plage.", "latin-1", "latin-1"),
        ("“Quoted” text – with a dash", "cp1252", "cp1252"),
        ("# Autor: Jürgen\nint main() { return 0; }\n", "latin-1", "latin-1"),
        ("Все люди рождаются свободными и равными в своем достоинстве и правах.", "cp1251", "cp1251"),
        ("Все люди рождаются свободными и равными в своем достоинстве и правах.", "koi8-r", "koi8_r"),
        ("すべての人間は、生まれながらにして自由であり", "shift_jis", "shift_jis"),
        ("すべての人間は、生まれながらにして自由であり", "euc_jp", "euc_jp"),
        ("人人生而自由,在尊严和权利上一律平等。", "gb18030", "gb18030"),
    ],
)
def test_other_encodings_are_guessed(text: str, encoding: str, named: str) -> None:
    assert decode(text.encode(encoding)) == (text, named)


@given(st.binary(min_size=1, max_size=200))
def test_whatever_is_no_text_is_refused(data: bytes) -> None:
    try:
        text, encoding = decode(data)
    except NotText:
        return
    assert text.encode(encoding) == data or encoding.startswith("utf")
    assert not is_binary(data) or data.startswith(b"%PDF-")  # which is read as such before it is decoded


@pytest.mark.parametrize("data", [b"\0", b"\x7fELF\x02\x01\x01\0\0\0\0\0", b"abc\0" * 9, b"\x89PNG\r\n\x1a\n\xff\x00"])
def test_binary(data: bytes) -> None:
    assert is_binary(data)
    with pytest.raises(NotText, match=r"^is binary$"):
        decode(data)


def test_controls_of_no_text_are_binary() -> None:
    with pytest.raises(NotText, match=r"^is binary$"):
        decode(b"\xff\xfa\x01\x02\x03 and so on")


def test_an_encoding_can_be_named() -> None:
    assert decode("Ωμέγα".encode("cp1253"), "cp1253") == ("Ωμέγα", "cp1253")
    with pytest.raises(NotText, match="is not utf-8 at byte 1"):
        decode(b"a\xff", "utf-8")
    with pytest.raises(NotText, match="encoding: 'klingon': must be one that Python knows"):
        decode(b"a", "klingon")


def test_a_wide_text_that_is_cut_is_said_to_be() -> None:
    with pytest.raises(NotText, match="is not utf-16"):
        decode(codecs.BOM_UTF16_LE + b"a\0b")
