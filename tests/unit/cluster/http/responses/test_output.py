"""Items and events of answers, which follow from the tokens one by one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.outputs import OutputToken
from cluster.http.answers import AnswerScanner
from cluster.http.responses.output import OutputWriter
from cluster.text.tools.formats import ToolFormat
from protos.jobs.chat import Tool, ToolChoice

JOB = f"job_{'0123456789abcdef' * 2}"
NUMBER = JOB.removeprefix("job_")
CALLS = (
    "Let me look.\n", '<tool_call>\n{"name": "f", "argu', 'ments": {"a"', ': 1}}\n</tool_call>\n<tool_call>\n{"name": ',
    '"s__now"}\n</tool_call>',
)  # fmt: skip
NAMES = {"s__now": ("s", "now")}


def tokens(*words: str, reasoning: tuple[str, ...] = ()) -> list[OutputToken]:
    thought = [OutputToken(n, 0, n, text, part="reasoning", reasoning=text) for n, text in enumerate(reasoning, 1)]
    at = len(thought) + 1
    return thought + [OutputToken(n, 0, n, text, answer=text) for n, text in enumerate(words, at)]


def write(
    found: list[OutputToken],
    complete: bool = True,
    *,
    tools: bool = False,
    one_call: bool = False,
    failed: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The events and the output."""
    scanner = AnswerScanner(ToolFormat.QWEN3_JSON, [Tool("f")] if tools else [], ToolChoice(one_call=one_call))
    writer = OutputWriter(JOB, scanner, NAMES)
    events = [event for token in found for event in writer.push(token)]
    events += writer.end(complete, failed)
    return events, writer.output()


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_behind_reasoning() -> None:
    events, output = write(tokens("a", "", "b", reasoning=("hm ", "so")))
    thought, said = ["reasoning_text.delta"] * 2, ["output_text.delta"] * 2
    assert kinds(events) == [
        "output_item.added", "content_part.added", *thought, "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", *said, "output_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip
    assert output == [
        {"id": f"rs_{NUMBER}_0", "type": "reasoning", "status": "completed", "summary": [],
         "content": [{"type": "reasoning_text", "text": "hm so"}]},
        {"id": f"msg_{NUMBER}_1", "type": "message", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "ab", "annotations": [], "logprobs": []}]},
    ]  # fmt: skip
    added = events[7]["item"]
    assert (added["status"], added["content"]) == ("in_progress", [])
    assert events[8]["part"]["text"] == ""
    assert events[9] == {
        "type": "response.output_text.delta", "item_id": f"msg_{NUMBER}_1", "output_index": 1, "content_index": 0,
        "delta": "a", "logprobs": [],
    }  # fmt: skip
    assert [event["item"] for event in events if event["type"].endswith("item.done")] == output


def test_calls() -> None:
    events, output = write(tokens(*CALLS), tools=True)
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds(events) == [
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", call[0], call[1], *call[1:], *call,
    ]  # fmt: skip
    assert output[1:] == [
        {"id": f"fc_{NUMBER}_1", "type": "function_call", "status": "completed", "call_id": f"call_{NUMBER}_0",
         "name": "f", "arguments": '{"a": 1}'},
        {"id": f"fc_{NUMBER}_2", "type": "function_call", "status": "completed", "call_id": f"call_{NUMBER}_1",
         "name": "now", "namespace": "s", "arguments": "{}"},
    ]  # fmt: skip
    assert events[6]["item"]["arguments"] == ""
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["item_id"], event["arguments"]) for event in done] == [
        (f"fc_{NUMBER}_1", '{"a": 1}'), (f"fc_{NUMBER}_2", "{}"),
    ]  # fmt: skip
    assert len(write(tokens(*CALLS), tools=True, one_call=True)[1]) == 2


@pytest.mark.parametrize("failed", [False, True])
def test_a_call_that_is_cut_short_is_never_done(failed: bool) -> None:
    events, output = write(tokens(*CALLS[:3]), complete=False, tools=True, failed=failed)
    assert kinds(events)[-1] == "function_call_arguments.delta"
    assert (output[-1]["status"], output[-1]["arguments"]) == ("incomplete", '{"a"')
    assert output[0]["status"] == "completed"


def test_a_text_that_is_cut_short_is_done_unless_it_failed() -> None:
    events, output = write(tokens("a"), complete=False)
    assert kinds(events)[-3:] == ["output_text.done", "content_part.done", "output_item.done"]
    assert output[0]["status"] == events[-1]["item"]["status"] == "incomplete"
    events, output = write(tokens("a"), complete=False, failed=True)
    assert kinds(events)[-1] == "output_text.delta"
    assert output[0]["status"] == "incomplete"


def test_a_broken_call_in_a_whole_answer_is_marked() -> None:
    events, output = write(tokens(*CALLS[:3]), tools=True)
    assert (kinds(events)[-1], output[-1]["status"]) == ("output_item.done", "incomplete")


def test_an_answer_of_nothing_has_a_message() -> None:
    events, output = write([])
    assert [item["type"] for item in output] == ["message"]
    assert output[0]["content"][0]["text"] == ""
    assert "output_text.delta" not in kinds(events)
    assert [item["type"] for item in write(tokens(reasoning=("hm",)))[1]] == ["reasoning", "message"]
    assert write([], complete=False) == ([], [])


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_the_events_add_up_to_the_output(cuts: list[int], complete: bool) -> None:
    """However the text is cut into tokens."""
    text = "".join(CALLS)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    words = [text[a:b] for a, b in itertools.pairwise(places)]
    events, output = write(tokens(*words, reasoning=("x",)), complete, tools=True)
    texts: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(output):
        shown = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert texts[index] == shown
        assert item["id"].endswith(f"_{index}")
    whole = write(tokens(text, reasoning=("x",)), complete, tools=True)[1]
    assert output == whole
    assert json.loads(output[2]["arguments"]) == {"a": 1}


def test_tokens_are_counted() -> None:
    writer = OutputWriter(JOB, AnswerScanner(ToolFormat.NONE, [], ToolChoice()), {})
    for token in tokens("a", "b", reasoning=("x",)):
        writer.push(token)
    assert (writer.num_tokens, writer.num_reasoning) == (3, 1)
