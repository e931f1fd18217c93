"""The table of tasks, lengths and modes, from the plain data of a result file."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from cluster.common.units import format_count
from cluster.tools.display import in_table, plain_table
from cluster.tools.eval.ruler import scoring
from cluster.tools.eval.ruler.scoring import differences


def scores_of(report: dict[str, Any], mode: str, length: int) -> dict[str, list[float]]:
    """Return the scores of all samples by task, of tasks that have a result."""
    cells = {
        cell["task"]: cell
        for cell in report["cells"]
        if (cell["mode"], cell["length"]) == (mode, length) and "outcomes" in cell
    }
    return {
        task: [outcome["score"] for outcome in cells[task]["outcomes"]] for task in report["tasks"] if task in cells
    }


def average(report: dict[str, Any], mode: str, length: int) -> tuple[float, float] | None:
    """Return the mean over tasks and the half-width of its interval; None unless every task has a result."""
    scores = scores_of(report, mode, length)
    return scoring.average(scores.values()) if len(scores) == len(report["tasks"]) else None


def ruler_table(report: dict[str, Any]) -> Table:
    """Return a line a task and length with a column a mode: the score in percent with its 95 % interval."""
    table = plain_table("task", "tokens", *map(in_table, report["modes"]))
    for column in table.columns[1:]:
        column.justify = "right"
    cells = {(cell["task"], cell["length"], cell["mode"]): cell for cell in report["cells"]}
    for task in report["tasks"]:
        for length in report["lengths"]:
            found = [cells.get((task, length, mode)) for mode in report["modes"]]
            table.add_row(in_table(task), format_count(length), *map(_score, found))
    for length in report["lengths"] if len(report["tasks"]) > 1 else ():
        means = [average(report, mode, length) for mode in report["modes"]]
        shown = [f"{100 * mean[0]:.1f} ±{100 * mean[1]:.1f}" if mean else "" for mean in means]
        table.add_row("average", format_count(length), *shown)
    return table


def cost_of_sparse(report: dict[str, Any]) -> list[str]:
    """Return a line a length: how many points sparse prefill scores less than dense, sample by sample."""
    lines = []
    for length in report["lengths"]:
        found = differences(scores_of(report, "sparse", length), scores_of(report, "dca", length))
        if found is not None:
            mean, reach = found
            lines.append(f"sparse less dca at {format_count(length)}: {100 * mean:+.1f} ±{100 * reach:.1f} points")
    return lines


def _score(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "error" in cell:
        return "[red]failed[/]"
    low, high = cell["interval"]
    colour = "green" if cell["score"] >= 0.85 else "red" if cell["score"] < 0.5 else "yellow"
    return f"[{colour}]{100 * cell['score']:.0f}[/] ({100 * low:.0f}-{100 * high:.0f})"
