"""Tool calls of a chat completion: what a scanner finds in the answer, as deltas of a stream or as a whole message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.http.answers import AnswerScanner
from cluster.text.tools.events import AnswerText, CallArguments, CallStarted, ToolEvent
from cluster.text.tools.formats import ToolFormat
from protos.jobs.chat import Tool, ToolChoice


class CallWriter:
    """Shows the text of one answer as content and tool calls; without tools all of it is content."""

    def __init__(self, form: ToolFormat, tools: Iterable[Tool], choice: ToolChoice, answer_id: str) -> None:
        """
        Args:
            choice: with `one_call`, calls after the first are dropped.
            answer_id: what ids of calls begin with, so that those of two answers differ.
        """
        self._scanner = AnswerScanner(form, tools, choice)
        self._answer_id = answer_id

    def push(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas of the next text of the answer."""
        return self._deltas(self._scanner.push(text))

    def flush(self) -> list[dict[str, Any]]:
        """Return the deltas of what was held back: the answer has ended."""
        return self._deltas(self._scanner.flush())

    def message(self) -> dict[str, Any]:
        """Return content and calls as fields of a message; content is None beside calls and without text."""
        found = self._scanner.found
        calls = [self._head(index, call.name, call.arguments) for index, call in enumerate(found.calls)]
        return {"content": found.text or None, "tool_calls": calls} if calls else {"content": found.text}

    def finish_reason(self, reason: str) -> str:
        """Return why the answer ended: `tool_calls` for one with calls that was not cut short."""
        return "tool_calls" if self._scanner.found.calls and reason == "stop" else reason

    def _deltas(self, events: Iterable[ToolEvent]) -> list[dict[str, Any]]:
        return [delta for event in events if (delta := self._delta(event))]

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
