"""What a scanner finds in the text of an answer: text, and tool calls whose arguments come as fragments of JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AnswerText:
    """Text that belongs to no tool call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call of the tool `name`; calls of an answer are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the JSON text of a call's arguments; never empty."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The end of a call; not `complete`: its text broke off, and so may the JSON of its arguments."""

    index: int
    complete: bool


ToolEvent = AnswerText | CallStarted | CallArguments | CallEnded


@dataclass(slots=True)
class FoundCall:
    """A call with its fragments joined."""

    name: str
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class ScannedText:
    """What all events of an answer amount to: the text outside of calls, and the calls in their order."""

    text: str = ""
    calls: list[FoundCall] = field(default_factory=list)

    def add(self, events: Iterable[ToolEvent]) -> None:
        """Take in the next events."""
        for event in events:
            match event:
                case AnswerText(text):
                    self.text += text
                case CallStarted(_, name):
                    self.calls.append(FoundCall(name))
                case CallArguments(index, fragment):
                    self.calls[index].arguments += fragment
                case CallEnded(index, complete):
                    self.calls[index].complete = complete
