"""Tool calls as Qwen3 writes them (Hermes form): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from cluster.text.tools.json_value import JsonValueEnd
from cluster.text.tools.scanner import CALL_OPEN, MAX_NAME_CHARS, ToolScanner

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OBJECT = re.compile(r'\{\s*["}]')
_MAX_STRING_CHARS = 6 * MAX_NAME_CHARS + 2  # of a key or a name, written with escapes


class QwenJsonScanner(ToolScanner):
    """Finds calls in JSON; the text of their arguments is passed on as it is.

    The object has a `name` and may have `arguments` (none: `{}`), in any order, and other fields, which are dropped.
    """

    def __init__(self) -> None:
        super().__init__([CALL_OPEN])
        self._name = ""
        self._arguments: str | None = None  # those that came before the name, or all of them when they are no object
        self._has_started = False
        self._value = JsonValueEnd()

    def _begin(self, tag: str) -> Callable[[], bool]:
        self._name, self._arguments, self._has_started = "", None, False
        return self._read_brace

    def _read_brace(self) -> bool:
        if not self._skip_space():
            return self._wait_or_give_up()
        if self._buffer[0] != "{":
            return self._is_no_call()
        self._take(1)
        self._state = self._read_key
        return True

    def _read_key(self) -> bool:
        if not self._skip_space():
            return self._wait_or_end()
        if self._buffer[0] == "}":
            return self._finish()
        key = self._read_string()
        if not key:
            return self._wait_or_end() if key is None else self._break_off()
        self._key, self._state = key, self._read_colon
        return True

    def _read_colon(self) -> bool:
        if not self._skip_space():
            return self._wait_or_end()
        if self._buffer[0] != ":":
            return self._break_off()
        self._take(1)
        self._value = JsonValueEnd()
        is_first = not self._has_started and self._arguments is None
        self._state = self._read_other
        if self._key == "name" and not self._name:
            self._state = self._read_name
        elif self._key == "arguments" and is_first:
            self._state = self._read_arguments
        return True

    def _read_name(self) -> bool:
        if not self._skip_space():
            return self._wait_or_end()
        name = self._read_string()
        if not name or len(name) > MAX_NAME_CHARS:
            return self._wait_or_end() if name is None else self._break_off()
        self._name = name
        if self._arguments is not None:
            return self._start_whole()
        self._state = self._read_comma
        return True

    def _read_arguments(self) -> bool:
        """Decide whether arguments can be passed on as they come."""
        if not self._skip_space():
            return self._wait_or_end()
        if self._name and self._buffer[0] == "{":
            if _OBJECT.match(self._buffer):
                self._start_call(self._name)
                self._has_started, self._state = True, self._stream_arguments
                return True
            return self._wait_or_end() if self._buffer[1:].isspace() or self._buffer == "{" else self._break_off()
        self._arguments, self._state = "", self._hold_arguments
        return True

    def _stream_arguments(self) -> bool:
        size = self._value.read(self._buffer)
        self._emit_arguments(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return self._after_value()

    def _hold_arguments(self) -> bool:
        taken = self._take(self._value.read(self._buffer))
        self._arguments = (self._arguments or "") + taken
        if self._value.done and self._name:
            return self._start_whole()
        return self._after_value()

    def _read_other(self) -> bool:
        self._take(self._value.read(self._buffer))
        return self._after_value()

    def _after_value(self) -> bool:
        if self._value.broken:
            return self._break_off()
        if not self._value.done:
            return self._wait_or_end()
        self._state = self._read_comma
        return True

    def _read_comma(self) -> bool:
        if not self._skip_space():
            return self._wait_or_end()
        if self._buffer[0] == "}":
            return self._finish()
        if self._buffer[0] != ",":
            return self._break_off()
        self._take(1)
        self._state = self._read_key
        return True

    def _start_whole(self) -> bool:
        """Start a call whose name came last, or whose arguments are no object as they stand."""
        arguments = _object_text(self._arguments or "")
        if arguments is None:
            return self._is_no_call()
        self._start_call(self._name)
        self._emit_arguments(arguments)
        self._has_started, self._state = True, self._read_comma
        return True

    def _finish(self) -> bool:
        if not self._name:
            return self._is_no_call()
        self._take(1)
        if not self._has_started:
            self._start_call(self._name)
            self._emit_arguments("{}")
        return self._end_call(complete=True)

    def _read_string(self) -> str | None:
        """Consume and return a string; None while it has no end, "" for what is none."""
        match = _STRING.match(self._buffer)
        if match is None:
            is_open = self._buffer.startswith('"') and len(self._buffer) < _MAX_STRING_CHARS
            return None if is_open else ""
        if match.end() > _MAX_STRING_CHARS:
            return ""
        try:
            text = str(json.loads(match[0]))
            text.encode()
        except ValueError:  # a wrong escape, or half a surrogate pair
            return ""
        self._take(match.end())
        return text

    def _wait_or_end(self) -> bool:
        """Wait for more text; without any a call that has begun breaks off, and its rest is dropped."""
        if not self._ends:
            return False
        if self._has_started:
            self._buffer = ""
        return self._break_off()

    def _break_off(self) -> bool:
        """Give up what is no JSON of a call: text, if the call has not begun."""
        return self._end_call(complete=False) if self._has_started else self._is_no_call()


def _object_text(value: str) -> str | None:
    """Return the JSON text of an object that a value is, or that a string holds; null is an empty one."""
    try:
        found = json.loads(value)
        text = value.strip()
        if isinstance(found, str):
            text = found.strip()
            text.encode()
            found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return "{}" if found is None else text if isinstance(found, dict) else None
