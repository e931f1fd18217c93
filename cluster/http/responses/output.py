"""The output of a response: its items, and the events that tell of them.

Both follow from the tokens of the answer one by one, and from nothing else: whoever reads the same tokens, whenever and
in whatever groups, gets the same events in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.engine.outputs import OutputToken
from cluster.http.answers import AnswerScanner
from cluster.http.responses.names import call_id, digits, function_name
from cluster.text.tools.events import AnswerText, CallArguments, CallEnded, CallStarted, ToolEvent

Event = dict[str, Any]
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_IN_PROGRESS = "in_progress"


class _Item:
    """One item while it is written."""

    def __init__(self, kind: str, index: int, number: str, fields: Mapping[str, Any]) -> None:
        """
        Args:
            index: its place in the output.
            number: what the ids of a response have in common.
        """
        self.kind = kind
        self.index = index
        self.id = f"{_PREFIXES[kind]}_{number}_{index}"
        self.status = _IN_PROGRESS
        self.pieces: list[str] = []
        self._fields = fields

    @property
    def text(self) -> str:
        """What was written so far: text, or arguments."""
        return "".join(self.pieces)

    def show(self, empty: bool = False) -> dict[str, Any]:
        """Return the item; `empty`: as it was when it began."""
        shown = {"id": self.id, "type": self.kind, "status": self.status, **self._fields}
        if self.kind == "function_call":
            return {**shown, "arguments": "" if empty else self.text}
        content = [] if empty else [self.part()]
        return (
            {**shown, "summary": [], "content": content} if self.kind == "reasoning" else {**shown, "content": content}
        )

    def part(self, empty: bool = False) -> dict[str, Any]:
        """Return the only part of the content."""
        text = "" if empty else self.text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class OutputWriter:
    """Turns the tokens of one answer into events, without their numbers.

    Attributes:
        num_tokens, num_reasoning: how many tokens there were, and those of them that are reasoning.
    """

    def __init__(self, job_id: str, scanner: AnswerScanner, names: Mapping[str, tuple[str, str]]) -> None:
        """
        Args:
            scanner: finds calls.
            names: see `split_names`.
        """
        self.num_tokens = self.num_reasoning = 0
        self._job_id = job_id
        self._scanner = scanner
        self._names = names
        self._items: list[_Item] = []
        self._open: _Item | None = None  # the last item, while it may go on

    def push(self, token: OutputToken) -> list[Event]:
        """Return the events of the next token."""
        self.num_tokens += 1
        self.num_reasoning += token.part == "reasoning"
        events = self._write("reasoning", token.reasoning) if token.reasoning else []
        return events + self._take(self._scanner.push(token.answer))

    def end(self, complete: bool, failed: bool = False) -> list[Event]:
        """Return the last events: the answer has ended.

        Args:
            complete: nothing was cut short. A call that was is never said to be done: clients would make it.
            failed: no item is said to be done any more.
        """
        events = self._take(self._scanner.flush())
        if complete and all(item.kind == "reasoning" for item in self._items):
            events += self._write("message", "")
        if self._open is None:
            return events
        if not complete:
            self._open.status = "incomplete"
        if failed or (not complete and self._open.kind == "function_call"):
            self._open = None
            return events
        return events + self._close()

    def output(self) -> list[dict[str, Any]]:
        """Return the items so far."""
        return [item.show() for item in self._items]

    def _take(self, found: list[ToolEvent]) -> list[Event]:
        events: list[Event] = []
        for event in found:
            match event:
                case AnswerText(text):
                    events += self._write("message", text)
                case CallStarted(index, name):
                    events += self._begin_call(index, name)
                case CallArguments(_, fragment):
                    events += self._append(fragment)
                case CallEnded(_, complete):
                    if complete:
                        events += self._close()
                    elif self._open is not None:
                        self._open.status = "incomplete"
        return events

    def _write(self, kind: str, text: str) -> list[Event]:
        """Return the events of a text that goes on with the last item, or begins one."""
        events: list[Event] = []
        if self._open is None or self._open.kind != kind:
            events += self._close()
            events += self._begin(kind, {"role": "assistant"} if kind == "message" else {})
        return events + (self._append(text) if text else [])

    def _begin(self, kind: str, fields: Mapping[str, Any]) -> list[Event]:
        item = self._open = _Item(kind, len(self._items), digits(self._job_id), fields)
        self._items.append(item)
        added = {"type": "response.output_item.added", "output_index": item.index, "item": item.show(empty=True)}
        if kind == "function_call":
            return [added]
        return [added, self._event("content_part.added", part=item.part(empty=True))]

    def _begin_call(self, index: int, name: str) -> list[Event]:
        fields = {"call_id": call_id(self._job_id, index), **function_name(name, self._names)}
        return self._close() + self._begin("function_call", fields)

    def _append(self, text: str) -> list[Event]:
        assert self._open is not None
        self._open.pieces.append(text)
        more: dict[str, Any] = {"logprobs": []} if self._open.kind == "message" else {}
        return [self._event(f"{self._stem()}.delta", delta=text, **more)]

    def _close(self) -> list[Event]:
        """Return what ends the last item, if it is open."""
        item = self._open
        if item is None:
            return []
        if item.status == _IN_PROGRESS:
            item.status = "completed"
        done = {"type": "response.output_item.done", "output_index": item.index, "item": item.show()}
        if item.kind == "function_call":
            ended = [self._event(f"{self._stem()}.done", arguments=item.text)]
        else:
            more: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
            part = self._event("content_part.done", part=item.part())
            ended = [self._event(f"{self._stem()}.done", text=item.text, **more), part]
        self._open = None
        return [*ended, done]

    def _stem(self) -> str:
        """Return what the events about the text of the last item are named after."""
        assert self._open is not None
        stems = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
        return stems[self._open.kind]

    def _event(self, name: str, **fields: Any) -> Event:
        """Return an event about the last item."""
        item = self._open
        assert item is not None
        place = {"item_id": item.id, "output_index": item.index}
        if item.kind != "function_call":
            place["content_index"] = 0
        return {"type": f"response.{name}", **place, **fields}
