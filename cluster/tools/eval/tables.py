"""Tables of evaluation results for a terminal, made from the plain data of a result file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.common.text_format import one_line
from cluster.common.units import format_count
from cluster.tools.display import in_table, plain_table
from cluster.tools.eval.ruler.tables import cost_of_sparse, describe_samples, ruler_table

_LEVELS = "▁▂▃▄▅▆▇█"


def depth_scores(report: dict[str, Any], mode: str, length: int) -> list[float | None]:
    """Return the share of right answers a needle, from the top of the document down; None without a result."""
    rows = [
        [outcome["right"] for outcome in cell["outcomes"]]
        for cell in report["cells"]
        if cell["mode"] == mode and cell["length"] == length and "outcomes" in cell
    ]
    if not rows:
        return [None] * report["needles"]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def needle_table(report: dict[str, Any]) -> Table:
    """Return a line a mode and length: the score, where in the document it was lost, and what reading took."""
    table = plain_table("attention", "tokens", "right", "by depth", "first token", "prefill", "density", "recall")
    for column in table.columns[1:3] + table.columns[4:]:
        column.justify = "right"
    for mode in report["modes"]:
        for length in report["lengths"]:
            cells = [cell for cell in report["cells"] if cell["mode"] == mode and cell["length"] == length]
            done = [cell for cell in cells if "error" not in cell]
            if done:
                table.add_row(in_table(mode), format_count(length), *_figures(report, mode, length, done))
            if len(done) < len(cells):
                table.add_row(in_table(mode), format_count(length), "[red]failed[/]")
    return table


def failures(report: dict[str, Any]) -> list[str]:
    """Return a line for every cell that has no result."""
    failed = [cell for cell in report["cells"] if "error" in cell]
    tasks = [f"{one_line(cell['task'])} " if "task" in cell else "" for cell in failed]
    return [
        f"{one_line(cell['mode'])} {task}{format_count(cell['length'])}: {one_line(cell['error'])}"
        for cell, task in zip(failed, tasks, strict=True)
    ]


def _figures(report: dict[str, Any], mode: str, length: int, cells: Sequence[dict[str, Any]]) -> list[str]:
    right, total = sum(cell["right"] for cell in cells), sum(cell["total"] for cell in cells)
    colour = "green" if right == total else "red" if right < total / 2 else "yellow"
    rates = [cell["prefill_tokens_per_s"] for cell in cells if cell["prefill_tokens_per_s"]]
    attention = [cell.get("attention", {}) for cell in cells]
    shares = [[each[key] for each in attention if each.get(key) is not None] for key in ("density", "held_out_recall")]
    return [
        f"[{colour}]{right}/{total}[/]",
        strip(depth_scores(report, mode, length)),
        f"{np.mean([cell['ttft_s'] for cell in cells]):.1f} s",
        f"{np.mean(rates):,.0f}/s" if rates else "",
        *(f"{np.mean(values):.0%}" if values else "" for values in shares),
    ]


def strip(scores: Sequence[float | None]) -> str:
    """Return scores as a strip of bars, the beginning of the document first: full is all right, a dot is all wrong."""
    return "".join("?" if score is None else "·" if score == 0 else _LEVELS[round(score * 7)] for score in scores)


def recall_table(report: dict[str, Any]) -> Table:
    """Return a column a variant: how far its next tokens and logits are from the dense ones, and what it visited."""
    variants = report["variants"]
    table = plain_table("", "dense", *(in_table(variant["name"]) for variant in variants))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("same next token", "", *(f"{variant['same_top1']}/{report['next']}" for variant in variants))
    table.add_row("largest logit error", "", *(f"{variant['logit_error_max']:.2g}" for variant in variants))
    table.add_row("mean KL, nats", "", *(f"{variant['kl_mean']:.2g}" for variant in variants))
    table.add_row("prefill", *(f"{entry['prefill_s']:.1f} s" for entry in (report["reference"], *variants)))
    names = ("pairs visited", "recall", "lowest recall", "head-cells made dense")
    for row in zip(names, *(_head_figures(entry.get("heads")) for entry in ({}, *variants)), strict=True):
        table.add_row(*row)
    return table


def pinned_table(report: dict[str, Any]) -> Table:
    """Return a line a pinned length and way to read: how far it is from the same way under the document's own scale."""
    titles = ("scale of", "prefill", "attention logits", "same next token", "logit error", "mean", "mean KL, nats")
    table = plain_table(*titles)
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for entry in report["pinned"]:
        table.add_row(
            format_count(entry["scale_len"]), "sparse" if entry["sparse"] else "dense",
            f"x {entry['logit_factor']:.4f}", f"{entry['same_top1']}/{report['next']}",
            f"{entry['logit_error_max']:.2g}", f"{entry['logit_error_mean']:.2g}", f"{entry['kl_mean']:.2g}",
        )  # fmt: skip
    return table


def _head_figures(heads: dict[str, Any] | None) -> tuple[str, str, str, str]:
    """Return the last four rows of a column; of a dense variant without `heads`."""
    if not heads:
        return "100%", "", "", ""
    recall = np.array(heads["held_out_recall"], float)
    layer, head = np.unravel_index(int(recall.argmin()), recall.shape)
    lowest = f"L{layer} H{head} {recall.min():.1%}"
    return f"{np.mean(heads['density']):.0%}", f"{recall.mean():.1%}", lowest, f"{np.mean(heads['dense_share']):.0%}"


def _print_ruler(report: dict[str, Any], console: Console) -> None:
    title = f"{in_table(report['model'])}, {describe_samples(report)}, score in percent"
    console.print(f"{title} (95 % interval)", highlight=False)
    console.print(ruler_table(report))
    for line in cost_of_sparse(report):
        console.print(line, highlight=False)
    for line in report.get("notes", ()):
        console.print(line, style="dim", markup=False, highlight=False)
    if not report["complete"]:
        console.print("not finished", style="dim")
    for line in failures(report):
        console.print(f"failed: {line}", style="red", markup=False, highlight=False)


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the table of any evaluation, and how to read it."""
    if report["what"] == "ruler":
        _print_ruler(report, console)
        return
    if report["what"] == "needle":
        asked = "answer in the prompt up to its code" if report["form"] == "prompt" else "question, then the answer"
        console.print(f"{in_table(report['model'])}, {report['needles']} needles a document, {asked}", highlight=False)
        console.print(needle_table(report))
        unfinished = "" if report["complete"] else "; not finished"
        console.print(f"by depth: the beginning of the document is on the left{unfinished}", style="dim")
        for line in failures(report):
            console.print(f"failed: {line}", style="red", markup=False, highlight=False)
        return
    console.print(
        f"{in_table(report['model'])}, {report['tokens']:,} tokens of {in_table(report['text'])}, "
        f"{report['next']} tokens after them",
        highlight=False,
    )
    if report["variants"]:
        console.print(recall_table(report))
        console.print(
            "recall: attention mass kept in rows that were not looked at when keys were chosen; "
            "lowest: its layer and head",
            style="dim",
        )
    if report.get("pinned"):
        console.print(pinned_table(report))
        console.print("pinned length scale, beside the same prefill under the document's own", style="dim")
