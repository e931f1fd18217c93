"""Find the end of a JSON value while its text comes, without parsing it."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'[^"{}\[\]<>\'`]*')  # what may be between strings and brackets
_INSIDE = re.compile(r'[^"\\]*')
_LITERAL = re.compile(r"[0-9A-Za-z+\-.]*")


class JsonValueEnd:
    """Reads one value, in pieces of any size: its strings and brackets decide where it ends.

    `done` is set behind its last character, `broken` at one that no JSON has there.
    """

    def __init__(self) -> None:
        self.done = self.broken = False
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._has_begun = self._is_literal = False

    def read(self, text: str) -> int:
        """Return how many of these characters belong to the value, white space before it among them."""
        at = 0
        if not self._has_begun:
            at = len(text) - len(text.lstrip())
            if at == len(text):
                return at
            self._has_begun, self._is_literal = True, text[at] not in '"{['
        if self._is_literal:
            return self._read_literal(text, at)
        while at < len(text) and not (self.done or self.broken):
            at = self._read_string(text, at) if self._in_string else self._read_outside(text, at)
        return at

    def _read_literal(self, text: str, at: int) -> int:
        end = _end(_LITERAL, text, at)
        if end < len(text):
            self.done = text[end] in ",}" or text[end].isspace()
            self.broken = not self.done
        return end

    def _read_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        at = _end(_INSIDE, text, at)
        if at < len(text):
            self._is_escaped = text[at] == "\\"
            self._in_string = self._is_escaped
            self.done = not self._in_string and self._depth == 0
            at += 1
        return at

    def _read_outside(self, text: str, at: int) -> int:
        at = _end(_OUTSIDE, text, at)
        if at == len(text):
            return at
        char = text[at]
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        else:
            self.broken = True
            return at
        return at + 1


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
