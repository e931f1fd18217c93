"""One report of several result files of `longreach eval ruler`: their cells side by side, for a table and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.common.text_format import one_line
from cluster.common.units import format_count
from cluster.tools.eval.ruler.sample import NOT_RULER
from cluster.tools.eval.ruler.tables import all_scores
from protos.errors import UserError

# what must be the same in all files: whose answers they are, to which samples, and how these are scored
_SAME = ("model", "scoring", "tasks", "samples", "kv", "text", "seed", "max_tokens", "thinking")
Report = Mapping[str, Any]
Cell = dict[str, Any]
Place = tuple[str, int, str, int]  # mode, length, task or tasks, haystack


def merge(files: Sequence[tuple[str, Report]]) -> tuple[dict[str, Any], list[str]]:
    """Return one report with the cells of several, and a line for each mode and length of which cells were replaced.

    Of a cell that several files have, the last one counts, unless it failed there. Cells with another number of
    questions a haystack are of other samples, so they replace all that a mode and length had. Settings and questions
    that are not the same in all files are named in `notes` and `note` of the report.

    Args:
        files: at least one; the name of each and its report.

    Raises:
        UserError: a file is of another evaluation, or differs from the first in its model, its scoring or its samples.
    """
    (first_name, first), *others = files
    for name, report in files:
        if report["what"] != "ruler":
            raise UserError(f"{name}: is of `longreach eval {report['what']}`: several files must all be of eval ruler")
    for name, report in others:
        for key in _SAME:
            if report.get(key) != first.get(key):
                there, here = one_line(str(first.get(key))), one_line(str(report.get(key)))
                raise UserError(f"{name}: {key}: {here}: must be that of {first_name}, which is {there}")
    kept, replaced = _collect(files)
    cells = [cell for _, cell in kept.values()]
    modes = {mode: settings for _, report in reversed(files) for mode, settings in report["modes"].items()}
    order = dict.fromkeys(mode for _, report in files for mode in report["modes"])
    report = dict(first) | {
        "lengths": sorted({length for _, report in files for length in report["lengths"]}),
        "modes": {mode: modes[mode] for mode in order},
        "cells": cells,
        "notes": [line for mode in order for line in _differences(mode, kept.values(), files)],
    }
    report.pop("note", None)
    if note := _questions(cells):
        report["note"] = note
    done = [all_scores(report, mode, length) for mode in order for length in report["lengths"]]
    report["complete"] = all(len(scores) == len(report["tasks"]) for scores in done)
    return report, replaced


def _collect(files: Sequence[tuple[str, Report]]) -> tuple[dict[Place, tuple[int, Cell]], list[str]]:
    """Return the cells that count, each with the number of its file, and a line for those that were replaced."""
    kept: dict[Place, tuple[int, Cell]] = {}
    replaced: Counter[tuple[str, int, int, int]] = Counter()
    for number, (_, report) in enumerate(files):
        for found in report["cells"]:
            cell = dict(found) | {"questions": report.get("questions", 1)}
            earlier = {place: old for place, old in kept.items() if old[0] < number and _excludes(old[1], cell)}
            if "error" in cell and any("error" not in old for _, old in earlier.values()):
                continue
            for place, (before, _) in earlier.items():
                del kept[place]
                replaced[cell["mode"], cell["length"], before, number] += 1
            kept[cell["mode"], cell["length"], cell["task"], cell.get("haystack", 0)] = number, cell
    lines = [
        f"{one_line(mode)} {format_count(length)}: {count} cell{'s' * (count > 1)} of {files[before][0]} replaced by "
        f"{files[number][0]}"
        for (mode, length, before, number), count in replaced.items()
    ]
    return kept, lines


def _excludes(old: Cell, new: Cell) -> bool:
    """Return whether two cells of different files cannot both count."""
    if any(old[key] != new[key] for key in ("mode", "length")):
        return False
    return old["questions"] != new["questions"] or (old["task"], old.get("haystack")) == (
        new["task"], new.get("haystack"),
    )  # fmt: skip


def _questions(cells: Iterable[Cell]) -> str:
    """Return how many questions a haystack has at which lengths, and what that means; nothing where each has one."""
    lengths: dict[int, set[int]] = {}
    for cell in cells:
        lengths.setdefault(cell["questions"], set()).add(cell["length"])
    if set(lengths) <= {1}:
        return ""
    if len(lengths) == 1:
        return f"questions: {next(iter(lengths))} a haystack; {NOT_RULER}"
    parts = [
        f"{number} a haystack at {_counts(at)}{f', {NOT_RULER}' if number > 1 else ''}"
        for number, at in sorted(lengths.items())
    ]
    return f"questions: {'; '.join(parts)}"


def _differences(mode: str, kept: Iterable[tuple[int, Cell]], files: Sequence[tuple[str, Report]]) -> list[str]:
    """Return a line for each setting of a mode that is not the same for all of its cells, with its lengths."""
    lengths: dict[int, set[int]] = {}
    for number, cell in kept:
        if cell["mode"] == mode:
            lengths.setdefault(number, set()).add(cell["length"])
    settings = {number: files[number][1]["modes"][mode] for number in lengths}
    lines = []
    for key in dict.fromkeys(key for facts in settings.values() for key in facts):
        values: dict[str, set[int]] = {}
        for number, facts in settings.items():
            values.setdefault(_text(facts.get(key, "none")), set()).update(lengths[number])
        if len(values) > 1:
            by_length = sorted(values.items(), key=lambda pair: min(pair[1]))
            said = zip(_unlike([value for value, _ in by_length]), (at for _, at in by_length), strict=True)
            parts = [f"{value} at {_counts(at)}" for value, at in said]
            name = "" if key == mode else f" {key.replace('_', ' ')}"
            lines.append(f"{mode}:{name} {'; '.join(parts)}")
    return lines


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unlike(texts: Sequence[str]) -> list[str]:
    """Return texts without those of their parts, between commas, that all of them have."""
    parts = [text.split(", ") for text in texts]
    common = set(parts[0]).intersection(*parts[1:])
    return [", ".join(part for part in each if part not in common) or ", ".join(each) for each in parts]


def _counts(lengths: Iterable[int]) -> str:
    return ", ".join(map(format_count, sorted(lengths)))
