"""The picture of scores over length: a panel a task, a line a mode, with intervals."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from cluster.common.units import format_count
from cluster.tools.eval.ruler.tables import average, describe_samples, result
from cluster.tools.figures import empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_PANEL = (2.9, 2.2)  # inches
_LETTERS_AN_INCH = 10  # of the title
_STYLES = {"plain": ("#7f7f7f", "o"), "yarn": ("#e08214", "s"), "dca": ("#2166ac", "^"), "sparse": ("#b2182b", "v")}
_OTHER = ("#1b7837", "D")


def draw_scores(report: dict[str, Any]) -> Figure:
    """Return the figure of a result. Raises UserError without matplotlib."""
    panels = [*report["tasks"], "average"] if len(report["tasks"]) > 1 else report["tasks"]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = empty_figure(max(4.6, columns * _PANEL[0]), rows * _PANEL[1] + 1.0)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, report, panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("length (tokens)")
    for axis in axes[:, 0]:
        axis.set_ylabel("score")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
        title="\n".join(report.get("notes", ())), title_fontproperties={"size": 8},
    )  # fmt: skip
    title = f"{report['model']}: {describe_samples(report)}, 95 % intervals"
    figure.suptitle("\n".join(wrap(title, int(_LETTERS_AN_INCH * figure.get_figwidth()))), fontsize=12)
    return figure


def _draw_panel(axis: Any, report: dict[str, Any], panel: str) -> None:
    lengths, modes = report["lengths"], list(report["modes"])
    for number, mode in enumerate(modes):
        points = [(length, *found) for length in lengths if (found := _point(report, panel, mode, length))]
        colour, marker = _STYLES.get(mode, _OTHER)
        shift = 1 + 0.07 * (number - (len(modes) - 1) / 2)  # so that intervals do not hide each other
        x = [length * shift for length, *_ in points]
        y = [100 * mean for _, mean, _, _ in points]
        below = [100 * max(0.0, mean - low) for _, mean, low, _ in points]
        above = [100 * max(0.0, high - mean) for _, mean, _, high in points]
        axis.errorbar(x, y, [below, above], color=colour, marker=marker, markersize=4, capsize=2, label=mode)
    axis.set_title(panel, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [format_count(length) for length in lengths])
    axis.minorticks_off()
    axis.set_ylim(-4, 104)
    axis.grid(alpha=0.3)


def _point(report: dict[str, Any], panel: str, mode: str, length: int) -> tuple[float, float, float] | None:
    """Return score, low and high of a task, or of the average; None without a result."""
    if panel == "average":
        found = average(report, mode, length)
        return (found[0], found[0] - found[1], found[0] + found[1]) if found else None
    return result(report, mode, length, panel)
