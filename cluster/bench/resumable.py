"""Results of long runs, one JSON line each, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results:
    """Rows of a run, kept in memory and, where there is a path, in a file of JSON lines.

    The first line says what run it is; a file of another run is refused.
    """

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        """Read what an earlier run of the same kind has left. Raises ValueError for a file of another run."""
        self._path = path
        self.run = run
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        complete = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
        if complete and complete[0] != run:
            raise ValueError(f"{path}: it is of another run ({complete[0]}): name another file, or ask for the same")
        self.rows = complete[1:]
        if path is not None:
            path.write_text("".join(json.dumps(row) + "\n" for row in [run, *self.rows]), encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write it at once."""
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
