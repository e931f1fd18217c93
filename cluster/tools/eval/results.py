"""Result files of evaluations and benchmarks: dated names, written whole or not at all, updated during the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from protos.errors import UserError
from protos.node.environment import commit_id, environment


class ResultFile:
    """`STEM-DATE.json` in a folder, and the path of the picture beside it; an older result is never overwritten."""

    def __init__(self, folder: Path, stem: str, resumed: Path | None = None) -> None:
        """Choose a new name in `folder`, or go on with the file `resumed`. Raises UserError."""
        self.environment = environment() | {"commit": commit_id()}
        if resumed is not None:
            self.path = resumed
            return
        date = self.environment["date"][:10]
        make_folder(folder)
        number = 1
        while (path := folder / f"{stem}-{date}{f'-{number}' if number > 1 else ''}.json").exists():
            number += 1
        self.path = path

    @property
    def picture(self) -> Path:
        """The path of the picture."""
        return self.path.with_suffix(".png")

    def write(self, report: dict[str, Any]) -> None:
        """Replace the file by `report` with the environment it was made in."""
        text = json.dumps(report | {"environment": self.environment}, indent=1, ensure_ascii=False)
        partial = self.path.with_suffix(".json.part")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)


def make_folder(folder: Path) -> None:
    """Make the folder of results if it is absent. Raises UserError: nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder}: cannot be made ({error.strerror}): name another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out: {folder}: is not writable: name another folder")


def read_json(path: Path) -> Any:
    """Return what a file has as JSON. Raises UserError: it cannot be read, or is none."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def read_result(path: Path) -> dict[str, Any]:
    """Return the report in a result file. Raises UserError when it is none."""
    report = read_json(path)
    if not isinstance(report, dict) or report.get("what") not in ("needle", "recall", "ruler"):
        raise UserError(f"{path}: is not a result of `longreach eval`")
    return report
