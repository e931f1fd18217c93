"""The content blocks of an answer: thinking, text and tool calls, as events of a stream or as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.http.core.sse import named_event
from cluster.text.tools.events import AnswerText, CallArguments, CallStarted, ToolEvent


class BlockWriter:
    """Collects the blocks of one answer; each is ended when another begins.

    Attributes:
        blocks: those so far.
    """

    def __init__(self, answer_id: str) -> None:
        """
        Args:
            answer_id: what ids of calls begin with, so that those of two answers differ.
        """
        self.blocks: list[dict[str, Any]] = []
        self._answer_id = answer_id
        self._arguments: dict[int, str] = {}  # JSON text of the input of each block that is a call
        self._is_open = False

    def think(self, text: str) -> bytes:
        """Add to the reasoning; returns the events of it."""
        if not text:
            return b""
        started = self._need("thinking", {"thinking": "", "signature": ""})
        self.blocks[-1]["thinking"] += text
        return started + self._delta({"type": "thinking_delta", "thinking": text})

    def take(self, events: Iterable[ToolEvent]) -> bytes:
        """Add what a scanner finds in the answer; returns the events of it."""
        return b"".join(map(self._take, events))

    def _take(self, found: ToolEvent) -> bytes:
        match found:
            case AnswerText(text):
                if not text or not (text.strip() or self._kind == "text"):
                    return b""  # white space between calls is no block
                started = self._need("text", {"text": ""})
                self.blocks[-1]["text"] += text
                return started + self._delta({"type": "text_delta", "text": text})
            case CallStarted(index, name):
                ended = self.end()
                call = {"id": f"toolu_{self._answer_id}_{index}", "name": name, "input": {}}
                return ended + self._need("tool_use", call)
            case CallArguments(_, fragment):
                at = len(self.blocks) - 1
                self._arguments[at] = self._arguments.get(at, "") + fragment
                return self._delta({"type": "input_json_delta", "partial_json": fragment})
        return b""

    @property
    def _kind(self) -> str:
        return self.blocks[-1]["type"] if self._is_open else ""

    def _need(self, kind: str, content: Mapping[str, Any]) -> bytes:
        """Begin a block unless the open one is of this kind."""
        if self._kind == kind:
            return b""
        ended = self.end()
        self.blocks.append({"type": kind, **content})
        self._is_open = True
        shown = {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": self.blocks[-1]}
        return ended + named_event(shown)

    def end(self) -> bytes:
        """End the open block; returns the events of it."""
        if not self._is_open:
            return b""
        at, block = len(self.blocks) - 1, self.blocks[-1]
        signed = b""
        if block["type"] == "thinking":  # clients wait for one; nobody checks it
            signed = self._delta({"type": "signature_delta", "signature": ""})
        elif block["type"] == "tool_use":
            block["input"] = parse_input(self._arguments.pop(at, ""))
        self._is_open = False
        return signed + named_event({"type": "content_block_stop", "index": at})

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        shown = {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}
        return named_event(shown)


def parse_input(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call as an object; what is none, as an answer that was cut short has, is empty."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
