"""The report: a Markdown file with the tables of result files, and pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.bench.report.curves import decode_figure, efficiency_figure, first_token_figure, throughput_figure
from cluster.bench.report.experts import expert_rows, experts_figure
from cluster.bench.report.files import Result
from cluster.bench.report.gantt import gantt_figure, layout_name, timelines
from cluster.bench.report.scatter import fit_figure, recall_figure
from cluster.bench.speed.tables import cells, notes
from cluster.common.units import format_count
from cluster.tools.eval.results import make_folder
from cluster.tools.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def write_report(results: Sequence[Result], out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write `report.md` and its pictures into a folder; returns the paths of all files, the report first.

    Raises UserError: the folder cannot be written, or matplotlib is missing.
    """
    make_folder(out)
    written, shown = [], []
    for name, title, figure in pictures(results):
        paths = [out / f"{name}.{kind}" for kind in formats]
        for path in paths:
            save_figure(figure, path)
        written += paths
        shown.append(f"## {title}\n\n![{title}]({paths[0].name})\n")
    path = out / "report.md"
    path.write_text("\n".join(["# Speed\n", *shown, *_tables(results)]), encoding="utf-8")
    return [path, *written]


def pictures(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, title and figure of every picture that the results have data for."""
    single = (
        ("first-token", "Time to first token against length", first_token_figure),
        ("decode", "Decode against context", decode_figure),
        ("efficiency", "Efficiency against stages and shards", efficiency_figure),
        ("throughput", "Throughput against jobs at a time", throughput_figure),
    )
    for name, title, draw in single:
        if (figure := draw(results)) is not None:
            yield name, title, figure
    seen: set[str] = set()
    for result, row in timelines(results):
        layout = f"{row['stages']}x{row['shards']}"
        name = f"gantt-{layout}-{format_count(row['length'])}"
        if name not in seen:
            seen.add(name)
            over = layout_name(row["stages"], row["shards"])
            title = f"Chunks over {over}, {format_count(row['length'])} tokens"
            yield name, title, gantt_figure(result, row)
    if (found := expert_rows(results)) is not None:
        yield "experts", "Load of experts", experts_figure(*found)
    for name, title, draw in (
        ("fit", "Latency model", fit_figure), ("recall", "Recall against density", recall_figure),
    ):  # fmt: skip
        if (figure := draw(results)) is not None:
            yield name, title, figure


def _tables(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        if result.what == "recall":
            continue
        yield f"## {result.what.removeprefix('bench ').capitalize()}: {result.path.name}\n"
        yield f"{result.details}.\n"
        yield _table(*cells(result.report)) + "\n"
        yield "\n".join(f"- {note}" for note in notes(result.report)) + "\n"
        if rows := list(_traffic(result)):
            yield "What links and reductions cost a chunk (medians of the last repeat):\n"
            header = ["stages x shards", "tokens", "sent, MiB", "sender kept, ms", "until the next stage has it, ms",
                      "of its busy time", "reduced, MiB", "in reductions, ms", "of the shard that waits least, ms",
                      "of its busy time"]  # fmt: skip
            yield _table(header, rows) + "\n"


def _traffic(result: Result) -> Iterator[list[str]]:
    for row in result.rows:
        if not (found := row.get("traffic")):
            continue
        link, reduced = found.get("link", {}), found.get("all_reduce", {})
        yield [
            f"{row['stages']} x {row['shards']}", format_count(row["length"]),
            _number(link.get("mib")), _number(link.get("send_ms")), _number(link.get("hop_ms")),
            _percent(link.get("send_share")), _number(reduced.get("mib")), _number(reduced.get("ms")),
            _number(reduced.get("least_ms")), _percent(reduced.get("share")),
        ]  # fmt: skip


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.1f}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{value:.1%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
