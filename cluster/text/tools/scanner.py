"""Find tool calls in the text of an answer while it comes: what the formats of different models share.

A scanner is given the answer alone, without the reasoning: calls that a model thinks about are none. It reads every
character once (a tag or a name that is not whole yet again with the next text) and emits what is certain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from cluster.text.tools.events import AnswerText, CallArguments, CallEnded, CallStarted, ToolEvent

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
MAX_NAME_CHARS = 256
_MAX_SPACE = 4  # white space before a call that belongs to it: templates write one line break


def held_back(text: str, tags: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins one of `tags` and is none."""
    longest = min(len(text), max(map(len, tags)) - 1)
    return next((n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)


class ToolScanner(ABC):
    """Splits one answer into text and calls. Whatever the pieces, events of the whole join to the same.

    Text passes as it is. What may still become a call waits: at most a tag and four characters of white space before
    it, and inside a tag until the name and the beginning of the arguments are known. What turns out to be no call is
    text again. White space between calls, before the first (up to four characters) and after the last is dropped.
    """

    def __init__(self, openings: Sequence[str]) -> None:
        """`openings`: the tags that a call may begin with."""
        self._openings = tuple(openings)
        self._buffer = ""  # not decided yet
        self._ends = False  # nothing follows the buffer
        self._index = -1  # of the newest call
        self._after_call = False  # no text since the last call
        self._opening = ""  # white space and tag of what may become a call
        self._header = ""  # what of it was read since
        self._events: list[ToolEvent] = []
        self._state: Callable[[], bool] = self._read_text

    def push(self, text: str) -> list[ToolEvent]:
        """Return what became certain with this text."""
        self._buffer += text
        return self._run()

    def flush(self) -> list[ToolEvent]:
        """Return the rest: the answer has ended."""
        self._ends = True
        return self._run()

    def _run(self) -> list[ToolEvent]:
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    # --- states: each consumes what it can and returns whether there may be more to do -------------------------------

    def _read_text(self) -> bool:
        """Pass text on up to the next opening tag."""
        found = [(at, tag) for tag in self._openings if (at := self._buffer.find(tag)) >= 0]
        at, tag = min(found, default=(len(self._buffer), ""))
        if not found and not self._ends:
            at -= held_back(self._buffer, self._openings)
        space = at - len(self._buffer[:at].rstrip())
        if not (self._after_call and space == at):
            space = min(space, _MAX_SPACE)
        if not found and self._ends:
            rest, self._buffer = self._buffer, ""
            self._emit_text("" if self._after_call and rest.isspace() else rest)
            return False
        self._emit_text(self._buffer[: at - space])
        if not found:
            self._buffer = self._buffer[at - space :]
            return False
        self._opening = self._buffer[at - space : at + len(tag)]
        self._buffer = self._buffer[at + len(tag) :]
        self._header = ""
        self._state = self._begin(tag)
        return True

    def _read_close(self) -> bool:
        """Drop the closing tag of a call that has ended, if it is there."""
        rest = self._buffer.lstrip()
        if rest.startswith(CALL_CLOSE):
            self._buffer = rest[len(CALL_CLOSE) :]
        elif CALL_CLOSE.startswith(rest) and not self._ends:
            return False
        self._state = self._read_text
        return True

    @abstractmethod
    def _begin(self, tag: str) -> Callable[[], bool]:
        """Return the state behind an opening tag."""

    # --- what states do ----------------------------------------------------------------------------------------------

    def _take(self, size: int) -> str:
        """Consume characters of what may become a call."""
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        self._header += taken
        return taken

    def _skip_space(self) -> bool:
        """Consume white space; return whether anything follows."""
        self._take(len(self._buffer) - len(self._buffer.lstrip()))
        return bool(self._buffer)

    def _is_no_call(self) -> bool:
        """Let the opening tag be text, and read on behind it."""
        self._emit_text(self._opening)
        self._buffer = self._header + self._buffer
        self._opening = self._header = ""
        self._state = self._read_text
        return True

    def _wait_or_give_up(self) -> bool:
        """Wait for more text; without any the call never began."""
        return self._is_no_call() if self._ends else False

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(AnswerText(text))
            self._after_call = False

    def _start_call(self, name: str) -> None:
        self._index += 1
        self._opening = self._header = ""
        self._events.append(CallStarted(self._index, name))

    def _emit_arguments(self, fragment: str) -> None:
        if fragment:
            self._events.append(CallArguments(self._index, fragment))

    def _end_call(self, complete: bool) -> bool:
        self._events.append(CallEnded(self._index, complete))
        self._after_call = True
        self._header = ""
        self._state = self._read_close
        return True
