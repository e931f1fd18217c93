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
    found: dict[str, list[float]] = {}
    cells = [cell for cell in report["cells"] if (cell["mode"], cell["length"]) == (mode, length)]
    for cell in sorted(cells, key=lambda cell: cell.get("haystack", 0)):
        for outcome in cell.get("outcomes", ()):
            found.setdefault(outcome.get("task", cell["task"]), []).append(outcome["score"])
    return {task: found[task] for task in report["tasks"] if task in found}


def questions_of(report: dict[str, Any], mode: str, length: int) -> int:
    """Return how many questions a haystack has at a mode and length; in a merged report it is a field of the cells."""
    cells = [cell for cell in report["cells"] if (cell["mode"], cell["length"]) == (mode, length)]
    return int((cells[0] if cells else report).get("questions", report.get("questions", 1)))


def all_scores(report: dict[str, Any], mode: str, length: int) -> dict[str, list[float]]:
    """Return the scores by task, of tasks that have all of their samples."""
    return {
        task: scores for task, scores in scores_of(report, mode, length).items() if len(scores) == report["samples"]
    }


def result(report: dict[str, Any], mode: str, length: int, task: str) -> tuple[float, float, float] | None:
    """Return the score of a task and its interval; None without a result. Some of its haystacks may be missing."""
    scores = scores_of(report, mode, length).get(task)
    return (
        (sum(scores) / len(scores), *scoring.interval(scores, questions_of(report, mode, length))) if scores else None
    )


def average(report: dict[str, Any], mode: str, length: int) -> tuple[float, float] | None:
    """Return the mean over tasks and the half-width of its interval; None unless every task has all samples."""
    scores = all_scores(report, mode, length)
    complete = len(scores) == len(report["tasks"])
    return scoring.average(scores.values(), questions_of(report, mode, length)) if complete else None


def describe_samples(report: dict[str, Any]) -> str:
    """Return how many samples there are, and what they are where they are not RULER's."""
    note = f" ({report['note']})" if "note" in report else ""
    return f"{report['samples']} samples a task and length{note}"


def ruler_table(report: dict[str, Any]) -> Table:
    """Return a line a task and length with a column a mode: the score in percent with its 95 % interval."""
    table = plain_table("task", "tokens", *map(in_table, report["modes"]))
    for column in table.columns[1:]:
        column.justify = "right"
    for task in report["tasks"]:
        for length in report["lengths"]:
            shown = [_score(report, mode, length, task) for mode in report["modes"]]
            table.add_row(in_table(task), format_count(length), *shown)
    for length in report["lengths"] if len(report["tasks"]) > 1 else ():
        means = [average(report, mode, length) for mode in report["modes"]]
        shown = [f"{100 * mean[0]:.1f} ±{100 * mean[1]:.1f}" if mean else "" for mean in means]
        table.add_row("average", format_count(length), *shown)
    return table


def cost_of_sparse(report: dict[str, Any]) -> list[str]:
    """Return a line a length: how many points sparse prefill scores less than dense, sample by sample."""
    lines = []
    for length in report["lengths"]:
        questions = questions_of(report, "sparse", length)
        if questions_of(report, "dca", length) != questions:  # other samples
            continue
        sparse, dense = all_scores(report, "sparse", length), all_scores(report, "dca", length)
        found = differences(sparse, dense, questions)
        if found is not None:
            mean, reach = found
            lines.append(f"sparse less dca at {format_count(length)}: {100 * mean:+.1f} ±{100 * reach:.1f} points")
    return lines


def _score(report: dict[str, Any], mode: str, length: int, task: str) -> str:
    found = result(report, mode, length, task)
    if found is None:
        cells = [cell for cell in report["cells"] if (cell["mode"], cell["length"]) == (mode, length)]
        return "[red]failed[/]" if any(task in cell["task"].split("+") for cell in cells) else ""
    score, low, high = found
    done = len(scores_of(report, mode, length)[task])
    part = f" of {done}" if done < report["samples"] else ""
    colour = "green" if score >= 0.85 else "red" if score < 0.5 else "yellow"
    return f"[{colour}]{100 * score:.0f}[/] ({100 * low:.0f}-{100 * high:.0f}){part}"
