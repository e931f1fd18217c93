"""The file of a benchmark: a line of JSON for every case, written when it is known.

A line names its `stage`, `case`, `state` and `call`, and of which build and card it is; what was measured stands beside
that. `begun` is written before a
case, `part` while it runs, then `done` or `failed`. Lines of a rehearsal say `"rehearsal": true`.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """Lines of one call are appended to `path`; those of calls before stay. `origin` is written into every line."""

    path: Path
    call: str
    rehearsal: bool = False
    origin: Line = field(default_factory=dict)

    def write(self, stage: str, case: str, state: str, values: Line | None = None) -> None:
        """Append a line; it is on disk when this returns."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        line: Line = {"stage": stage, "case": case, "state": state, "call": self.call, "at": now, **self.origin}
        if self.rehearsal:
            line["rehearsal"] = True
        text = json.dumps(line | (values or {}), default=str)
        with self.path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
            is_cut = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if is_cut else b"") + text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> set[tuple[str, str]]:
        """Return stage and case of what needs no repeat: it is done, in any call of this kind."""
        return {_key(line) for line in self._own() if line["state"] == "done"}

    def failed_here(self) -> set[tuple[str, str]]:
        """Return what failed in this call, and is left to the next one."""
        return {_key(line) for line in self._own() if line["state"] == "failed" and line["call"] == self.call}

    def open_case(self) -> Line | None:
        """Return the line of the case that was begun last in this call, if nothing says how it ended."""
        found = None
        for line in self._own():
            if line["call"] == self.call and line["state"] != "part":
                found = line if line["state"] == "begun" else None
        return found

    def newest(self, stage: str, case: str) -> Line | None:
        """Return the last line of a case that is done."""
        found = [line for line in self._own() if _key(line) == (stage, case) and line["state"] == "done"]
        return found[-1] if found else None

    def check_card(self) -> None:
        """Raise ValueError if the file has lines of another card: their ceilings are not those of this one."""
        card = self.origin.get("card")
        for line in self._own():
            if line.get("card", card) != card:
                raise ValueError(f"--out: {self.path}: has lines of {line['card']}, this is {card}: name another file")

    def _own(self) -> list[Line]:
        return [line for line in read_lines(self.path) if bool(line.get("rehearsal")) == self.rehearsal]


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, none where there is no file; lines that were cut are left out.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = {} if text.startswith("{") else None
        if line == {} or not text.strip():
            continue
        if not isinstance(line, dict) or not {"stage", "case", "state", "call"} <= set(line):
            raise ValueError(f"{path}: line {number} is not one of this benchmark: name another file")
        found.append(line)
    return found


def _key(line: Line) -> tuple[str, str]:
    return line["stage"], line["case"]
