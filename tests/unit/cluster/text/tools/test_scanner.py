"""What holds for the scanners of all forms of tool calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text.detokenizer import OutputText
from cluster.text.tools.events import AnswerText, CallArguments, CallEnded, CallStarted
from cluster.text.tools.formats import ToolFormat, make_scanner
from cluster.text.tools.scanner import CALL_OPEN, ToolScanner, held_back
from tests.support.data.tokenizers import BYTE_IDS, NEEDLE
from tests.support.tools.texts import TOOLS, cut_texts, fragments, plain, scan

FORMS = [ToolFormat.QWEN3_JSON, ToolFormat.QWEN3_XML]
CALLS = {
    ToolFormat.QWEN3_JSON: '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ToolFormat.QWEN3_XML: "<tool_call>\n<function=now>\n</function>\n</tool_call>",
}


def scanner_of(form: ToolFormat) -> ToolScanner:
    scanner = make_scanner(form, TOOLS)
    assert scanner is not None
    return scanner


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_pieces_of_any_size_give_the_same_as_the_whole(form: ToolFormat, data: st.DataObject) -> None:
    pieces = data.draw(cut_texts())
    assert scan(scanner_of(form), pieces) == scan(scanner_of(form), ["".join(pieces)])


@pytest.mark.parametrize("form", FORMS)
@given(text=fragments)
def test_calls_are_well_formed_events_whatever_the_text(form: ToolFormat, text: str) -> None:
    scanner = scanner_of(form)
    events = [event for char in text for event in scanner.push(char)] + scanner.flush()
    open_call = None
    started = 0
    for event in events:
        match event:
            case AnswerText(piece):
                assert piece
                assert open_call is None
            case CallStarted(index, name):
                assert open_call is None
                assert index == started
                assert name
                open_call, started = index, started + 1
            case CallArguments(index, fragment):
                assert index == open_call
                assert fragment
            case CallEnded(index, _):
                assert index == open_call
                open_call = None
    assert open_call is None


@pytest.mark.parametrize("form", FORMS)
@given(pieces=cut_texts(plain))
def test_plain_text_passes_unchanged(form: ToolFormat, pieces: list[str]) -> None:
    found = scan(scanner_of(form), pieces)
    assert (found.text, found.calls) == ("".join(pieces), [])


@pytest.mark.parametrize("form", FORMS)
@given(text=fragments.filter(lambda text: "<tool_call>" not in text and "<function=" not in text))
def test_no_more_than_a_tag_and_four_spaces_wait(form: ToolFormat, text: str) -> None:
    scanner, passed = scanner_of(form), 0
    for at, char in enumerate(text, 1):
        passed += sum(len(event.text) for event in scanner.push(char) if isinstance(event, AnswerText))
        assert at - passed < len(CALL_OPEN) + 4
    assert passed + sum(len(event.text) for event in scanner.flush() if isinstance(event, AnswerText)) == len(text)


@pytest.mark.parametrize("form", FORMS)
@given(before=plain, between=st.text(" \n", max_size=9), after=plain)
def test_white_space_around_calls(form: ToolFormat, before: str, between: str, after: str) -> None:
    call = CALLS[form]
    found = scan(scanner_of(form), [before, "\n", call, between, call, after])
    assert [found_call.arguments for found_call in found.calls] == ["{}", "{}"]
    kept = before + "\n"
    space = min(4, len(kept) - len(kept.rstrip()))
    assert found.text == kept[: len(kept) - space] + ("" if after.isspace() else after)


@pytest.mark.parametrize("form", FORMS)
def test_calls_that_are_only_thought_of_are_none(form: ToolFormat) -> None:
    scanner, output = scanner_of(form), OutputText(NEEDLE, [])
    text = f"<think>I could {CALLS[form]} now.</think>\n\nNo.\n{CALLS[form]}"
    found = []
    for byte in text.encode():
        found += scanner.push(output.push(BYTE_IDS[byte])[2])
    found += scanner.push(output.flush()[2]) + scanner.flush()
    assert [event for event in found if isinstance(event, CallStarted)] == [CallStarted(0, "now")]
    assert "".join(event.text for event in found if isinstance(event, AnswerText)) == "No."
    assert CALLS[form] in (output.result()[0] or "")


@pytest.mark.parametrize("form", FORMS)
def test_many_tags_that_begin_no_call(form: ToolFormat) -> None:
    for piece in ("<tool_call>", '<tool_call>{"', '<tool_call>{"arguments":[', "<function=", "<tool_call><function="):
        found = scan(scanner_of(form), [piece * 2_000])
        assert (found.text, found.calls) == (piece * 2_000, [])


def test_what_is_held_back() -> None:
    assert held_back("a <tool", ["<tool_call>"]) == 5
    assert held_back("<tool_call>", ["<tool_call>"]) == 0
    assert held_back("", ["<a>"]) == 0
    assert held_back("x<f<", ["<tool_call>", "<function="]) == 1
