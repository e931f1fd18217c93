"""Tool calls as Qwen3-Coder writes them: `<tool_call><function=NAME><parameter=KEY>value</parameter></function>...`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from cluster.text.tools.scanner import CALL_CLOSE, CALL_OPEN, MAX_NAME_CHARS, ToolScanner, held_back
from cluster.text.tools.schema_types import Schema, json_of_text, json_types, properties

FUNCTION_OPEN, FUNCTION_CLOSE = "<function=", "</function>"
PARAMETER_OPEN, PARAMETER_CLOSE = "<parameter=", "</parameter>"
NEXT_TAGS = (f"\n{PARAMETER_OPEN}", f"\n{FUNCTION_CLOSE}\n{CALL_CLOSE}")  # models leave the closing tag out at times
_VALUE_ENDS = ("\n" + PARAMETER_CLOSE, PARAMETER_CLOSE, *NEXT_TAGS)


class QwenXmlScanner(ToolScanner):
    """Finds calls in XML and writes their arguments as JSON, with the types that the schemas of the tools name.

    A string is passed on as it comes, any other value when it is whole. One line break behind the opening tag of a
    parameter and one before the closing tag belong to the tags. `<function=NAME>` alone is a call too if there is a
    tool of this name: models leave `<tool_call>` out at times.
    """

    def __init__(self, schemas: Mapping[str, Schema]) -> None:
        """`schemas`: of the parameters, by the names of the tools."""
        super().__init__([CALL_OPEN, FUNCTION_OPEN])
        self._schemas = schemas
        self._schema: Schema = {}
        self._is_first = True  # no parameter of the call yet
        self._types: frozenset[str] = frozenset()
        self._pieces: list[str] = []  # of a value that must be whole
        self._is_bare = False  # without <tool_call>

    def _begin(self, tag: str) -> Callable[[], bool]:
        self._is_bare = tag == FUNCTION_OPEN
        return self._read_name if self._is_bare else self._read_function

    def _read_function(self) -> bool:
        if not self._skip_space():
            return self._wait_or_give_up()
        if not self._buffer.startswith(FUNCTION_OPEN):
            return self._wait_or_give_up() if FUNCTION_OPEN.startswith(self._buffer) else self._is_no_call()
        self._take(len(FUNCTION_OPEN))
        self._state = self._read_name
        return True

    def _read_name(self) -> bool:
        name = self._find_name()
        if not name or (self._is_bare and name not in self._schemas):
            return self._wait_or_give_up() if name is None else self._is_no_call()
        self._buffer = self._buffer[len(name) + 1 :]
        self._schema, self._is_first = self._schemas.get(name, {}), True
        self._start_call(name)
        self._state = self._read_tag
        return True

    def _read_tag(self) -> bool:
        """Read the opening tag of a parameter, or the end of the call."""
        self._buffer = self._buffer.lstrip()
        if self._buffer.startswith(FUNCTION_CLOSE):
            self._buffer = self._buffer[len(FUNCTION_CLOSE) :]
            return self._finish(complete=True)
        if self._buffer.startswith(PARAMETER_OPEN):
            self._buffer = self._buffer[len(PARAMETER_OPEN) :]
            self._state = self._read_key
            return True
        may_become = any(tag.startswith(self._buffer) for tag in (FUNCTION_CLOSE, PARAMETER_OPEN))
        return self._wait_or_end() if may_become else self._finish(complete=False)

    def _read_key(self) -> bool:
        key = self._find_name()
        if not key:
            return self._wait_or_end() if key is None else self._finish(complete=False)
        self._buffer = self._buffer[len(key) + 1 :]
        before = "{" if self._is_first else ", "
        self._emit_arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        self._is_first, self._pieces = False, []
        self._types = json_types(properties(self._schema).get(key), self._schema)
        self._state = self._read_line_break
        return True

    def _read_line_break(self) -> bool:
        if not self._buffer and not self._ends:
            return False
        self._buffer = self._buffer.removeprefix("\n")
        if self._types <= {"string"}:
            self._emit_arguments('"')
        self._state = self._read_value
        return True

    def _read_value(self) -> bool:
        ends = [(at, -len(tag), tag) for tag in _VALUE_ENDS if (at := self._buffer.find(tag)) >= 0]
        at, _, tag = min(ends, default=(len(self._buffer), 0, ""))
        if not ends and not self._ends:
            at -= held_back(self._buffer, _VALUE_ENDS)
        is_string = self._types <= {"string"}
        end = at if tag in NEXT_TAGS else at + len(tag)
        piece, self._buffer = self._buffer[:at], self._buffer[end:]
        if is_string:
            self._emit_arguments(json.dumps(piece, ensure_ascii=False)[1:-1])
        else:
            self._pieces.append(piece)
        if not ends:
            return self._end_call(complete=False) if self._ends else False
        self._emit_arguments('"' if is_string else json_of_text("".join(self._pieces), self._types))
        self._state = self._read_tag
        return True

    def _find_name(self) -> str | None:
        """Return the name before the next `>`; None while there is none, "" if what comes is no name."""
        name, found, _ = self._buffer.partition(">")
        if len(name) > MAX_NAME_CHARS or any(char.isspace() or char in '<"' for char in name):
            return ""
        return name if found else None

    def _wait_or_end(self) -> bool:
        """Wait for more text; without any the call breaks off, and what is there of a tag is dropped."""
        if not self._ends:
            return False
        self._buffer = ""
        return self._end_call(complete=False)

    def _finish(self, complete: bool) -> bool:
        """End a call between two parameters, so that its arguments are whole JSON."""
        self._emit_arguments("{}" if self._is_first else "}")
        return self._end_call(complete)
