"""Read the stream of a response in the background, whatever becomes of the heads that serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import openai

Event = dict[str, Any]


class BackgroundReader:
    """One reader of one response, which goes on after the last number it has.

    Attributes:
        events: all events with a number of their own, in the order they came in.
        progress: how often progress was told.
        text: of the answer, as its deltas have it.
    """

    def __init__(self, client: openai.OpenAI, response_id: str) -> None:
        self.events: list[Event] = []
        self.progress = 0
        self.text = ""
        self._client = client
        self._id = response_id

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and self.events[-1]["type"] in (
            "response.completed", "response.incomplete", "response.failed",
        )  # fmt: skip

    def read(self, more: int | None = None) -> None:
        """Read until the end of the response, or `more` further events."""
        wanted = None if more is None else len(self.events) + more
        try:
            with self._client.responses.retrieve(self._id, stream=True, **self._place()) as stream:
                for event in stream:
                    self._take(event.to_dict())
                    if wanted is not None and len(self.events) >= wanted:
                        return
        except (openai.APIConnectionError, httpx.TransportError):
            return  # the head is gone; the next call goes on

    def _place(self) -> dict[str, Any]:
        return {"starting_after": self.events[-1]["sequence_number"]} if self.events else {}

    def _take(self, event: Event) -> None:
        is_progress = event["type"] == "response.in_progress" and event["response"]["longreach"]["total"] is not None
        if is_progress:
            self.progress += 1
            assert event["sequence_number"] == (self.events[-1]["sequence_number"] if self.events else 0)
            return
        assert event["type"] != "error", event
        self.events.append(event)
        self.text += event["delta"] if event["type"] == "response.output_text.delta" else ""

    def check(self) -> None:
        """Check that no event is missing, none came twice, and all of them add up to the response."""
        assert [event["sequence_number"] for event in self.events] == list(range(len(self.events)))
        assert self.has_ended
        response = self.events[-1]["response"]
        assert [e["item"] for e in self.events if e["type"] == "response.output_item.done"] == response["output"]
        texts = [part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]]
        assert self.text == "".join(texts)


def die_again_and_again(reader: BackgroundReader, restart: Callable[[], None], lives: Sequence[int]) -> None:
    """Read a response under heads that die and are followed by others, until the last has begun.

    Args:
        restart: kills the head and starts the next.
        lives: how many events are read under each head but the last.
    """
    for more in lives:
        reader.read(more)
        assert not reader.has_ended, "the answer is too short for so many deaths"
        restart()


def read_to_end(reader: BackgroundReader) -> None:
    """Read a response to its end."""
    while not reader.has_ended:
        reader.read()
