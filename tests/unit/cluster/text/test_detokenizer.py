"""Streaming decoding, stop strings, and the text of one output."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.text.detokenizer import IncrementalDecoder, OutputText, StopMatcher
from cluster.text.reasoning import split_reasoning
from cluster.text.tokenizer import TextTokenizer
from tests.support.data.tokenizers import BYTE_IDS, NEEDLE, SENTENCEPIECE, wrap
from tests.support.paths import NEEDLE as NEEDLE_DIR


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


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.integers(0, 8),
)
def test_stop_strings_of_the_first_pieces_do_not_count(pieces: list[str], stops: list[str], free: int) -> None:
    """Against every end of the text: the first one behind the free pieces at which a stop string is complete."""
    matcher, shown = StopMatcher(stops), ""
    for at, piece in enumerate(pieces):
        shown += matcher.push(piece, counts=at >= free)
    text, least = "".join(pieces), len("".join(pieces[:free]))
    for end in range(least + 1, len(text) + 1):
        if endings := [stop for stop in stops if text[:end].endswith(stop)]:
            assert matcher.stopped
            assert shown == text[: end - max(map(len, endings))] or len(shown) > end - max(map(len, endings))
            return
    assert not matcher.stopped
    assert shown + matcher.flush() == text


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
        ("why</think>because", False, (None, "why</think>because")),
        ("why</think>\n\n    def f(): pass", True, ("why", "    def f(): pass")),
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


WORDS = ["<think>", "</think>", "<", "</", "think>", "END", "E", "N", " ", "\n", "    x", "é", "漢", "🙂"]


@given(
    st.lists(st.sampled_from(WORDS), max_size=10).map("".join), st.booleans(), st.data(),
    st.lists(st.sampled_from(["END", "\n", "why", "x", "<", "think>", "N "]), max_size=2),
)  # fmt: skip
@settings(max_examples=500, deadline=None)
def test_what_is_streamed_is_the_result(text: str, opened: bool, data: st.DataObject, stop: list[str]) -> None:
    """Whatever tokens the text is cut into, with stop strings, an end at any token, or a resumption at any token."""
    ids = cut_anywhere(text, data)
    output, again = OutputText(NEEDLE, stop, opened), OutputText(NEEDLE, stop, opened)
    last = data.draw(st.integers(0, len(ids)))
    shown = []
    for index, token in enumerate(ids[:last]):
        shown.append(output.push(token, is_last=index == last - 1))
        again.push(token)
        if output.stopped:
            break
    whole, reasoning, answer = ("".join(pieces) for pieces in zip(*shown, strict=True)) if shown else ("", "", "")
    assert output.result() == (reasoning or None, answer)
    again.flush()
    assert again.result() == output.result()
    raw = NEEDLE.decode(ids[:last])
    unstopped = split_reasoning(raw, opened=opened)
    assert output.result() == (unstopped[0], naive_stop(unstopped[1], stop)[0])
    assert raw.startswith(whole)
    assert whole.endswith(answer)
    assert output.stopped or whole == raw


def cut_anywhere(text: str, data: st.DataObject) -> list[int]:
    """Return ids that decode to `text`, not only those that the tokenizer would choose."""
    ends = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    pieces = [text[a:b] for a, b in pairwise([0, *ends, len(text)])]
    as_bytes = data.draw(st.booleans())
    return [i for p in pieces for i in ([BYTE_IDS[b] for b in p.encode()] if as_bytes else NEEDLE.encode(p))]


@pytest.mark.parametrize(
    ("text", "opened", "stop", "expected"),
    [
        ("<think>one. two.</think>\n\nsix. ten", False, ".", ("one. two.", "six")),
        ("one. two.</think>six. ten", True, ".", ("one. two.", "six")),
        ("one. two.", True, ".", ("one. two.", "")),
        ("one</think>\n\nsix\nten", True, "\n", ("one", "six")),
        ("\n<think>one</think>six", False, "\n", ("one", "six")),
        ("\none", False, "\n", (None, "")),
        ("<think>one</think>six", False, "think", ("one", "six")),
        ("<thing>", False, "<th", (None, "")),
        ("one</think>six</think>ten", True, "</think>", ("one", "six")),
    ],
)
def test_stop_strings_count_in_the_answer_only(
    text: str, opened: bool, stop: str, expected: tuple[str | None, str]
) -> None:
    _, output = feed(text, (stop,), opened)
    assert output.result() == expected


def test_tags_that_are_special_tokens_are_tags_too() -> None:
    tokenizer = Tokenizer.from_str((NEEDLE_DIR / "tokenizer.json").read_text())
    tokenizer.add_special_tokens(["<think>", "</think>"])
    special = wrap(tokenizer)
    ids = special.encode("<think>why</think>\nso<|im_end|>")
    assert all(special.is_special(token) for token in (ids[0], ids[-1]))
    output = OutputText(special, ())
    shown = [output.push(token, is_last=token == ids[-1]) for token in ids]
    assert output.result() == ("why", "so")
    assert "".join(text for text, *_ in shown) == "<think>why</think>\nso"


def test_tags_of_tool_calls_that_are_special_tokens_are_shown() -> None:
    tokenizer = Tokenizer.from_str((NEEDLE_DIR / "tokenizer.json").read_text())
    tokenizer.add_special_tokens(["<tool_call>", "</tool_call>"])
    special = wrap(tokenizer)
    output = OutputText(special, ())
    text = "a<tool_call>b</tool_call>"
    assert "".join(output.push(token)[2] for token in special.encode(text + "<|im_end|>")) + output.flush()[2] == text
