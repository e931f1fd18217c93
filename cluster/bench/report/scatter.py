"""Points of many measurements: fitted against measured chunk times, recall against density of sparse heads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.bench.report.files import Result, common_details, machine_marks, rows_of
from cluster.common.units import format_count
from cluster.tools.figures import COLOURS, GREY, MARKERS, empty_figure, log_axis, plain_axes, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAND = 0.2  # share of the measured time that is drawn around it
_NARROW = 5.0  # the largest over the smallest value, up to which an axis has a tick at every digit
_HEAD, _MEANS = 6, (14, 11, 9)  # points: the markers of heads, of the means of the first series and of later ones


def fit_figure(results: Sequence[Result]) -> Figure | None:
    """Draw the fitted seconds of chunks against the measured ones, both logarithmic; None without chunks."""
    used = [result for result in results if result.what == "bench prefill"]
    marks = machine_marks(used)
    found: dict[str, list[tuple[float, float]]] = {}
    for result, row in rows_of(used, "bench prefill"):
        pairs = [(chunk["measured_s"], chunk["fitted_s"]) for chunk in row.get("chunks", [])]
        kept = [(measured, fitted) for measured, fitted in pairs if measured > 0 and fitted > 0]
        if kept:
            found.setdefault(f"{row['mode']}{marks[result.machine]}", []).extend(kept)
    if not found:
        return None
    figure = empty_figure(6.4, 5.2)
    axis = plain_axes(figure.subplots())
    every = [value for pairs in found.values() for pair in pairs for value in pair]
    line = [min(every) * 0.8, max(every) * 1.25]
    axis.fill_between(line, [x * (1 - _BAND) for x in line], [x * (1 + _BAND) for x in line], color="#e6e6e6",
                      linewidth=0, label=f"within {_BAND:.0%}")  # fmt: skip
    axis.plot(line, line, color=GREY, linewidth=1.0)
    for number, (name, pairs) in enumerate(found.items()):
        error = statistics.median(abs(fitted / measured - 1) for measured, fitted in pairs)
        axis.plot(*zip(*pairs, strict=True), MARKERS[number], color=COLOURS[number], markersize=5, alpha=0.7,
                  label=f"{name}: off by {error:.1%} (median of {len(pairs)})")  # fmt: skip
    for side in ("x", "y"):
        log_axis(axis, side, dense=line[1] < _NARROW * line[0])
        getattr(axis, f"set_{side}lim")(*line)
    axis.set_xlabel("measured seconds of a chunk")
    axis.set_ylabel("fitted seconds")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9)  # names of machines are long
    titled(figure, "Latency model: fitted against measured", common_details(used))
    return figure


def recall_figure(results: Sequence[Result]) -> Figure | None:
    """Draw held-out recall against density of every layer and head of sparse prefills; None without any."""
    used = [result for result in results if result.what == "recall"]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for result in used:
        for variant in result.report["variants"]:
            if heads := variant.get("heads"):
                name = f"{result.model}, {format_count(result.report['tokens'])}, {variant['name']}"
                density = [value for layer in heads["density"] for value in layer]
                found[name] = density, [value for layer in heads["held_out_recall"] for value in layer]
    if not found:
        return None
    figure = empty_figure(6.8, 4.8)
    axis = plain_axes(figure.subplots())
    for number, (name, (density, recall)) in enumerate(found.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        # hollow and of falling size, since variants of one prompt may lie on each other
        axis.plot(density, recall, marker, color=colour, markerfacecolor="none", markersize=_HEAD, label=name)
        axis.plot(statistics.fmean(density), statistics.fmean(recall), marker, color=colour, markeredgecolor="black",
                  markersize=_MEANS[min(number, len(_MEANS) - 1)])  # fmt: skip
    log_axis(axis, "x", percent=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axis.set_xlabel("share of the query-key pairs that are visited")
    axis.set_ylabel("attention mass kept in held-out rows")
    axis.set_ylim(top=1.01)
    axis.legend(loc="best", fontsize=8, framealpha=0.8, edgecolor="none")
    titled(figure, "Sparse prefill: recall against density", f"{common_details(used)}; filled: the mean of all heads")
    return figure
