from __future__ import annotations

from cluster.text.tools.events import AnswerText, CallArguments, CallEnded, CallStarted, FoundCall, ScannedText


def test_events_join() -> None:
    found = ScannedText()
    found.add([AnswerText("a"), CallStarted(0, "f"), CallArguments(0, "{")])
    found.add([CallArguments(0, "}"), CallEnded(0, True), AnswerText("b"), CallStarted(1, "g"), CallEnded(1, False)])
    assert found == ScannedText("ab", [FoundCall("f", "{}", True), FoundCall("g", "", False)])
