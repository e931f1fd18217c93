"""Tool calls of a chat completion: what a scanner finds in the answer, as deltas of a stream or as a whole message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.text.tools.events import AnswerText, CallArguments, CallStarted, ScannedText, ToolEvent
from cluster.text.tools.formats import ToolFormat, make_scanner
from protos.jobs.chat import Tool, ToolChoice


class CallWriter:
    """Splits the text of one answer into content and tool calls; without tools all of it is content.

    Attributes:
        found: content and calls so far.
    """

    def __init__(self, form: ToolFormat, tools: Iterable[Tool], choice: ToolChoice, answer_id: str) -> None:
        """
        Args:
            choice: with `one_call`, calls after the first are dropped.
            answer_id: what ids of calls begin with, so that those of two answers differ.
        """
        self.found = ScannedText()
        self._scanner = make_scanner(form, tools, choice)
        self._max_calls = 1 if choice.one_call else None
        self._answer_id = answer_id

    def push(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas of the next text of the answer."""
        if self._scanner is not None:
            return self._take(self._scanner.push(text))
        return self._take([AnswerText(text)] if text else [])

    def flush(self) -> list[dict[str, Any]]:
        """Return the deltas of what was held back: the answer has ended."""
        return self._take(self._scanner.flush()) if self._scanner is not None else []

    def message(self) -> dict[str, Any]:
        """Return content and calls as fields of a message; content is None beside calls and without text."""
        calls = [self._head(index, call.name, call.arguments) for index, call in enumerate(self.found.calls)]
        return {"content": self.found.text or None, "tool_calls": calls} if calls else {"content": self.found.text}

    def finish_reason(self, reason: str) -> str:
        """Return why the answer ended: `tool_calls` for one with calls that was not cut short."""
        return "tool_calls" if self.found.calls and reason == "stop" else reason

    def _take(self, events: Iterable[ToolEvent]) -> list[dict[str, Any]]:
        kept = [event for event in events if isinstance(event, AnswerText) or self._is_wanted(event.index)]
        self.found.add(kept)
        return [delta for event in kept if (delta := self._delta(event))]

    def _is_wanted(self, index: int) -> bool:
        return self._max_calls is None or index < self._max_calls

    def _delta(self, event: ToolEvent) -> dict[str, Any]:
        match event:
            case AnswerText(text):
                return {"content": text}
            case CallStarted(index, name):
                return {"tool_calls": [{"index": index, **self._head(index, name, "")}]}
            case CallArguments(index, fragment):
                return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
        return {}

    def _head(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{self._answer_id}_{index}", "type": "function", "function": function}
