"""Streaming decoding, stop strings, and the text of one output."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.detokenizer import IncrementalDecoder, OutputText, StopMatcher
from cluster.text.tokenizer import TextTokenizer
from tests.support.data.tokenizers import BYTE_IDS, NEEDLE, SENTENCEPIECE


def streamed(tokenizer: TextTokenizer, ids: list[int]) -> str:
    decoder = IncrementalDecoder(tokenizer)
    return "".join([*(decoder.push(i) for i in ids), decoder.flush()])


@given(st.lists(st.integers(0, NEEDLE.vocab_size + 3)))
@settings(deadline=None)
def test_incremental_decoding_of_any_ids(ids: list[int]) -> None:
    assert streamed(NEEDLE, ids) == NEEDLE.decode(ids)


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_incremental_decoding_of_any_bytes(data: bytes) -> None:
    ids = [BYTE_IDS[byte] for byte in data]
    assert streamed(NEEDLE, ids) == NEEDLE.decode(ids) == data.decode("utf-8", "replace")


@given(st.lists(st.integers(0, SENTENCEPIECE.vocab_size)))
@settings(max_examples=300, deadline=None)
def test_incremental_decoding_with_word_marks_and_byte_fallback(ids: list[int]) -> None:
    assert streamed(SENTENCEPIECE, ids) == SENTENCEPIECE.decode(ids)


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
    monkeypatch.setattr(SENTENCEPIECE, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    decoder = IncrementalDecoder(SENTENCEPIECE)
    for token_id in SENTENCEPIECE.encode("ab " * 500):
        decoder.push(token_id)
    assert max(sizes) <= 8


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
        shown += matcher.push(piece)
        expected, found = naive_stop(text, stops)
        assert matcher.stopped == found
        assert shown == expected if found else expected.startswith(shown)
        held = expected[len(shown) :]
        assert found or not held or any(stop.startswith(held) for stop in stops)  # nothing is held without reason
    assert shown + matcher.flush() == naive_stop(text, stops)[0]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        StopMatcher(["a", ""])


def feed(text: str, stop: tuple[str, ...] = (), opened: bool = False) -> tuple[str, OutputText]:
    output = OutputText(NEEDLE, stop, opened)
    joined = ""
    ids = NEEDLE.encode(text)
    for index, token in enumerate(ids):
        joined += output.push(token, is_last=index == len(ids) - 1)[0]
        if output.stopped:
            break
    return joined, output


@pytest.mark.parametrize("text", ["", "a", "the river ran", "naïve 漢字 🙂 end", "line\nline", "  spaces  "])
def test_pieces_join_to_the_text(text: str):
    joined, output = feed(text)
    assert (joined, output.stopped) == (text, False)
    assert output.result() == (None, text)


@pytest.mark.parametrize(
    ("stop", "text"), [(("漢",), "naïve "), (("字 🙂",), "naïve 漢"), (("n",), ""), (("🙂 end", "ve"), "naï")]
)
def test_stop_strings_cut_inside_tokens(stop: tuple[str, ...], text: str):
    joined, output = feed("naïve 漢字 🙂 end", stop)
    assert (joined, output.stopped) == (text, True)
    output.flush()
    assert output.result() == (None, text)


def test_a_withheld_beginning_of_a_stop_string_comes_with_the_last_token():
    joined, output = feed("the river ra", ("ran by",))
    assert (joined, output.stopped) == ("the river ra", False)


def test_a_withheld_beginning_of_a_stop_string_comes_with_the_flush():
    output = OutputText(NEEDLE, ("ran by",))
    for token in NEEDLE.encode("the river ra"):
        output.push(token)
    assert output.result() == (None, "the river ")
    output.flush()
    assert output.result() == (None, "the river ra")


@pytest.mark.parametrize("text", ["naïve 漢", "the river <|im_end|>", "a 🙂"])
def test_an_end_token_has_no_text_and_gives_up_what_is_withheld(text: str):
    *ids, end = NEEDLE.encode(text + " end")
    output = OutputText(NEEDLE, ("漢字", "🙂!"), end_ids={end})
    joined = "".join(output.push(token, is_last=token == end)[0] for token in [*ids, end])
    assert joined == output.result()[1] == NEEDLE.decode(ids)


def test_without_a_tokenizer_there_is_no_text():
    output = OutputText(None, ("x",))
    assert output.push(5) == output.push(6, is_last=True) == ("", "", "")
    output.flush()
    assert (output.stopped, output.part, output.result()) == (False, "answer", (None, ""))


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>why</think>because", False, ("why", "because")),
        ("why</think>because", True, ("why", "because")),
        ("because", False, (None, "because")),
    ],
)
def test_reasoning_is_split_off(text: str, opened: bool, expected: tuple[str | None, str]):
    _, output = feed(text, opened=opened)
    assert output.result() == expected


def test_each_token_says_what_it_adds_to_reasoning_and_answer():
    output = OutputText(NEEDLE, ("!",))
    pieces = []
    for token in NEEDLE.encode("<think>why not</think>\n\nso it is!"):
        text, reasoning, answer = output.push(token)
        pieces.append((text, reasoning, answer, output.part))
    assert "".join(text for text, *_ in pieces) == "<think>why not</think>\n\nso it is"
    assert "".join(reasoning for _, reasoning, *_ in pieces) == "why not"
    assert "".join(answer for _, _, answer, _ in pieces) == "so it is"
    parts = [part for *_, part in pieces]
    begin, end = parts.index("reasoning"), len(parts) - parts[::-1].index("reasoning")
    assert parts == ["answer"] * begin + ["reasoning"] * (end - begin) + ["answer"] * (len(parts) - end)
    assert "".join(text for text, *_ in pieces[: begin + 1]).startswith("<think>")
    assert "".join(text for text, *_ in pieces[: end + 1]).endswith("</think>")
