"""Literal text of every tokenizer family: no added token comes out of it, and no character of it is lost."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.text import literal_tokenizer
from cluster.text.prompts import build_document_prompts
from cluster.text.tokenizer import TextPart, TextTokenizer
from tests.support.data.tokenizer_families import ADDED, FAMILIES, marks_alone, word_piece
from tests.support.data.tokenizers import wrap

TOKENIZERS = {name: wrap(make()) for name, make in FAMILIES.items()}
HEAD = "{% for m in messages %}<s>a{{ m.content }}</s>{% endfor %}<t>"
CHATS = {name: TextTokenizer(make().to_str().encode(), {}, HEAD) for name, make in FAMILIES.items()}
PIECES = st.sampled_from(
    [
        *(token.content for token in ADDED),
        "a",
        "b",
        " ",
        "\n",
        "\n\n",
        ".",
        "é",
        "漢",
        "😀",
        "x",
        "<",
        "t>",
        "ool>",
        "1",
    ]
)
TEXTS = st.lists(PIECES | st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12).map(
    lambda pieces: unicodedata.normalize("NFC", "".join(pieces))
)
family = pytest.mark.parametrize("name", FAMILIES)


def added_ids(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    texts = {token.content for token in ADDED}
    return [entry for i in ids if (entry := tokenizer.id_to_token(i)) in texts and entry != "<unk>"]


def shown(tokenizer: TextTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


@family
@given(TEXTS)
@settings(max_examples=80, deadline=None)
def test_no_added_token_and_every_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, literal=True)
    assert added_ids(tokenizer, ids) == []
    assert shown(tokenizer, ids) in (text, " " + text if name == "roberta" else text.removeprefix(" "))
    rest = tokenizer.encode(text, literal=True, continues=True)
    assert added_ids(tokenizer, rest) == []
    before = tokenizer.encode("x")
    assert shown(tokenizer, before + rest) == shown(tokenizer, before) + text


@family
@given(TEXTS, st.integers(0, 30))
@settings(max_examples=80, deadline=None)
def test_seams_are_those_of_one_text(name: str, text: str, cut: int) -> None:
    assume(not marks_alone(name, text))
    tokenizer = TOKENIZERS[name]
    whole = tokenizer.encode(text)
    empty = TextPart("", literal=True)
    assert tokenizer.encode_parts([TextPart(text), empty]) == whole
    assert tokenizer.encode_parts([empty, TextPart(text)]) == whole
    literal = tokenizer.encode(text, literal=True)
    assert tokenizer.encode_parts([TextPart(text[:cut], True), TextPart(text[cut:], True)]) == literal
    if not tokenizer.spells_added(text):
        assert literal == whole
        assert tokenizer.encode_parts([TextPart(text[:cut]), TextPart(text[cut:], True)]) == whole


@family
@given(TEXTS, TEXTS)
@settings(max_examples=40, deadline=None)
def test_prompts_hold_document_and_question(name: str, document: str, question: str) -> None:
    tokenizer = CHATS[name]
    document, question = document or "d", question if question.strip() else "q"
    (prompt,) = build_document_prompts(tokenizer, document, [question], enable_thinking=None, max_model_len=1 << 20)
    assert f"a{document}\nQuestion: {question}</s>" in shown(tokenizer, prompt)
    assert added_ids(tokenizer, prompt) == ["<s>", "</s>", "<t>"]


@given(st.text("ab.<>tsoolx/ ", max_size=12))
@settings(deadline=None)
@pytest.mark.parametrize("strip", [False, True])
def test_word_pieces_lose_what_they_lose_anyway(strip: bool, text: str) -> None:
    tokenizer = wrap(word_piece(strip))
    ids = tokenizer.encode(text, literal=True)
    assert added_ids(tokenizer, ids) == []
    assert shown(tokenizer, ids).replace(" ", "") == text.replace(" ", "")


def test_white_space_at_the_ends_is_never_stripped() -> None:
    tokenizer = FAMILIES["llama 3"]()
    layout = tokenizer.to_str().replace(
        '"normalizer":null', '"normalizer":{"type":"Strip","strip_left":true,"strip_right":true}'
    )
    stripping = TextTokenizer(layout.encode(), {}, None)
    assert shown(stripping, stripping.encode(" a ")) == "a"
    assert shown(stripping, stripping.encode(" a ", literal=True)) == " a "
    parts = [TextPart("<s>"), TextPart(" a ", literal=True), TextPart(" b")]
    assert shown(stripping, stripping.encode_parts(parts)) == "<s> a  b"


def test_an_entry_without_another_spelling_stays() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken("a"), AddedToken("ab")])
    tokenizer.add_special_tokens(["<unk>"])
    ours = wrap(tokenizer)
    assert ours.encode("ab a?", literal=True) == [0, 1, 3, 0, 3]
    words = Tokenizer(models.WordLevel({"foo": 0, "bar": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_tokens(["foo"])
    assert wrap(words).encode("foo bar foobar", literal=True) == [0, 1, 2]


def test_most_models_are_shared_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    load = literal_tokenizer._load_model
    monkeypatch.setattr(literal_tokenizer, "_load_model", lambda model: loaded.append(model) or load(model))
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_special_tokens(["<s>"])
    for tokenizer, copies in ((wrap(plain), 0), (wrap(FAMILIES["llama 2"]()), 1)):  # the latter's vocabulary has `<s>`
        assert shown(tokenizer, tokenizer.encode("a<s>", literal=True)) == "a<s>"
        assert len(loaded) == copies
