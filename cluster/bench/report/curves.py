"""Curves of measured times: first token against length, decode against context, efficiency against processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.bench.report.files import Result, common_details, machine_marks, rows_of
from cluster.common.units import format_count
from cluster.tools.figures import COLOURS, GREY, MARKERS, empty_figure, log_axis, plain_axes, titled, token_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 7.2, 4.6  # inches
_LABEL_HEIGHT = 0.045  # of the efficiency axis
_NOTE = "hollow: other programs disturbed every repeat"


@dataclass
class Series:
    """Points of one curve: (x, median, smallest, largest), and whether each was ever measured undisturbed."""

    name: str
    points: list[tuple[float, float, float, float]] = field(default_factory=list)
    quiet: list[bool] = field(default_factory=list)

    def add(self, x: float, row: Mapping[str, Any], figure: str) -> None:
        """Add the figure of a row, if it has it."""
        found = row.get("figures", {}).get(figure)
        if found is not None:
            self.points.append((x, found["median"], found["min"], found["max"]))
            self.quiet.append(not row.get("all_disturbed", False))

    def draw(self, axis: Any, number: int) -> None:
        """Draw the curve with its range, in the colour and marker of its number."""
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        order = sorted(range(len(self.points)), key=lambda n: self.points[n][0])
        xs, middle, low, high = zip(*(self.points[n] for n in order), strict=True)
        below = [m - a for m, a in zip(middle, low, strict=True)]
        above = [b - m for m, b in zip(middle, high, strict=True)]
        axis.errorbar(xs, middle, (below, above), color=colour, linewidth=1.8, capsize=3, label=self.name,
                      marker=marker, markersize=6)  # fmt: skip
        hollow = [n for n in order if not self.quiet[n]]
        axis.plot([self.points[n][0] for n in hollow], [self.points[n][1] for n in hollow], marker, color="white",
                  markeredgecolor=colour, markersize=6, zorder=5)  # fmt: skip


def collect(rows: Iterable[tuple[str, float, Mapping[str, Any]]], figure: str) -> list[Series]:
    """Return the series of rows that are given as (name, x, row), in the order of their names' first rows."""
    found: dict[str, Series] = {}
    for name, x, row in rows:
        found.setdefault(name, Series(name)).add(x, row, figure)
    return [series for series in found.values() if series.points]


def first_token_figure(results: Sequence[Result]) -> Figure | None:
    """Draw seconds to the first token against tokens, log-log, one curve a mode or engine; None without rows."""
    used = [result for result in results if result.what in ("bench prefill", "bench compare")]
    marks, named, ours = machine_marks(used), [], _is_compared(used)
    for result, row in rows_of(used, "bench prefill", "bench compare"):
        named.append((f"{_series(row, ours)}{marks[result.machine]}", float(row["length"]), row))
    return _against_tokens(
        used, collect(named, "first_token_s"), "Time to first token", "prompt (tokens)", "seconds to the first token",
        log=True,
    )  # fmt: skip


def decode_figure(results: Sequence[Result]) -> Figure | None:
    """Draw milliseconds of a decode step against the tokens before it; None without rows."""
    used = [result for result in results if result.what in ("bench decode", "bench compare")]
    marks, named, ours = machine_marks(used), [], _is_compared(used)
    for result, row in rows_of(used, "bench decode", "bench compare"):
        named.append((f"{_series(row, ours)}{marks[result.machine]}", float(row["length"]), row))
    return _against_tokens(
        used, collect(named, "decode_ms"), "Decode", "context (tokens)", "milliseconds a token", log=False
    )


def efficiency_figure(results: Sequence[Result]) -> Figure | None:
    """Draw parallel efficiency against processes: stages and shards, strong and weak; None without such rows."""
    used = [result for result in results if result.what == "bench scaling"]
    marks = machine_marks(used)
    rows = [(result, row) for result, row in rows_of(used, "bench scaling") if "efficiency" in row]
    several = len({row["mode"] for _, row in rows}) > 1
    curves: dict[str, list[tuple[int, float, bool]]] = {}
    for result, row in rows:
        processes = row["stages"] * row["shards"]
        for part in ("stages", "shards"):
            if processes == 1 or row[part] == processes:
                mode = f", {row['mode']}" if several else ""
                name = f"{part}, {row['kind']}{mode}{marks[result.machine]}"
                curves.setdefault(name, []).append((processes, row["efficiency"], bool(row.get("oversubscribed"))))
    curves = {name: sorted(points) for name, points in curves.items() if len({point[0] for point in points}) > 1}
    if not curves:
        return None
    figure = empty_figure(*_SIZE)
    axis = plain_axes(figure.subplots())
    axis.axhline(1.0, color=GREY, linewidth=1.0, linestyle="--")
    for number, (name, points) in enumerate(curves.items()):
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        colour, marker = COLOURS[number], MARKERS[number]
        axis.plot(xs, ys, marker=marker, color=colour, linewidth=1.8, markersize=6, label=name)
        turns = [point for point in points if point[2]]
        axis.plot([p[0] for p in turns], [p[1] for p in turns], marker, color="white", markeredgecolor=colour, zorder=5)
    _label_points(axis, list(curves.values()))
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    axis.margins(x=0.12)
    axis.set_ylim(0.0, 1.15)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("stage processes")
    axis.set_ylabel("efficiency (ideal: 100 %)")
    axis.legend(frameon=False, loc="lower left")
    hollow = any(point[2] for points in curves.values() for point in points)
    note = "\nhollow: more threads than cores, so the processes take turns" if hollow else ""
    titled(figure, "Parallel efficiency of prefill", common_details(used) + note)
    return figure


def throughput_figure(results: Sequence[Result]) -> Figure | None:
    """Draw tokens a second against the jobs that run at a time, one curve a layout; None without such rows."""
    used = [result for result in results if any(row.get("kind") == "throughput" for row in result.rows)]
    rows = [(result, row) for result, row in rows_of(used, "bench scaling") if row["kind"] == "throughput"]
    marks = machine_marks(used)
    several = len({row["mode"] for _, row in rows}) > 1
    named = []
    for result, row in rows:
        mode = f", {row['mode']}" if several else ""
        name = f"{row['stages']} x {row['shards']}{mode}{marks[result.machine]}"
        named.append((name, float(row["jobs"]), row))
    curves = collect(named, "tokens_per_s")
    if not curves:
        return None
    figure, axis = _drawn(curves)
    axis.set_xscale("log", base=2)
    jobs = sorted({int(row["jobs"]) for _, row in rows})
    axis.set_xticks(jobs, list(map(str, jobs)))
    axis.minorticks_off()
    axis.set_ylim(bottom=0.0)
    axis.set_xlabel("jobs at a time")
    axis.set_ylabel("tokens a second, of prompts and answers")
    axis.legend(frameon=False, loc="lower right", title="stages x shards")
    sizes = list(dict.fromkeys(f"{format_count(row['length'])} in, {row['tokens']} out" for _, row in rows))
    note = "" if all(quiet for series in curves for quiet in series.quiet) else f"\n{_NOTE}"
    titled(figure, f"Throughput of jobs: {'; '.join(sizes)} (tokens)", common_details(used) + note)
    return figure


def _label_points(axis: Any, curves: Sequence[Sequence[tuple[int, float, bool]]]) -> None:
    """Write the value of every point of several processes beside it, lower where it would touch the one above."""
    labels = sorted(((x, y, n) for n, points in enumerate(curves) for x, y, _ in points if x > 1), reverse=True)
    last_x, last_y = 0, 0.0
    for x, y, number in labels:
        at = min(y, last_y - _LABEL_HEIGHT) if x == last_x else y
        axis.annotate(f"{y:.0%}", (x, at), (9, 0), textcoords="offset points", fontsize=9, va="center",
                      color=COLOURS[number], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
        last_x, last_y = x, at


def _drawn(curves: Sequence[Series]) -> tuple[Figure, Axes]:
    """Return a figure with one diagram of all curves."""
    figure = empty_figure(*_SIZE)
    axis = plain_axes(figure.subplots())
    for number, series in enumerate(curves):
        series.draw(axis, number)
    return figure, axis


def _is_compared(results: Iterable[Result]) -> bool:
    """Return whether there are other engines, so that ours must be named."""
    return any(result.what == "bench compare" for result in results)


def _series(row: Mapping[str, Any], name_ours: bool) -> str:
    """Return the name of a row's curve: engine and mode, and the layout where it is not one process."""
    engine, mode = str(row.get("engine", "longreach")), str(row["mode"])
    if engine != "longreach":
        return engine
    stages, shards = row.get("stages", 1), row.get("shards", 1)
    layout = "" if stages * shards == 1 else f", {stages} x {shards}"
    return f"longreach, {mode}{layout}" if name_ours else f"{mode}{layout}"


def _against_tokens(
    used: Sequence[Result], curves: Sequence[Series], title: str, x: str, y: str, *, log: bool
) -> Figure | None:
    if not curves:
        return None
    figure, axis = _drawn(curves)
    token_axis(axis, {int(point[0]) for series in curves for point in series.points}, x)
    if log:
        log_axis(axis, "y")
    else:
        axis.set_ylim(bottom=0.0)
    axis.set_ylabel(y)
    axis.legend(frameon=False)
    note = "" if all(quiet for series in curves for quiet in series.quiet) else f"\n{_NOTE}"
    titled(figure, title, f"{common_details(used)}; median, smallest and largest{note}")
    return figure
