"""Pictures of evaluation results: depth x length for needles, layer x head for recall. matplotlib is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cluster.common.units import format_count
from cluster.tools.eval.ruler.plots import draw_scores
from cluster.tools.eval.tables import depth_scores
from cluster.tools.figures import empty_figure, save_figure
from protos.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FAILED = "#d9d9d9"
_MAX_LABELS = 16  # on one axis

Grid = npt.NDArray[np.float64]  # 0..1, NaN where a value is missing
Labels = tuple[str, list[str], int]  # name of an axis, its labels and their rotation in degrees


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a result as PNG or SVG, as the path ends.

    Raises:
        UserError: matplotlib is not installed, the path ends otherwise, or there is nothing to draw.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"picture: {path}: must end with .png or .svg")
    if report["what"] == "needle":
        figure = _needles(report)
    elif report["what"] == "ruler":
        figure = draw_scores(report)
    elif report.get("pinned"):
        figure = _pinned(report)
    else:
        figure = _recall(report)
    save_figure(figure, path)


def _needles(report: dict[str, Any]) -> Figure:
    """Draw red what is lost, blue what is found: colour-blind readers can distinguish them."""
    lengths, needles = report["lengths"], report["needles"]
    panels = []
    for mode in report["modes"]:
        scores = np.array([depth_scores(report, mode, length) for length in lengths], float).T  # None becomes NaN
        known = scores[~np.isnan(scores)]
        panels.append((f"{mode}\n{known.mean():.0%} right" if known.size else f"{mode}\nnot run", scores))
    form = "answer begun in the prompt" if report["form"] == "prompt" else "question and answer"
    shared = ", half of the needles share a word" if report["shared_words"] else ""
    documents = f"{report['trials']} document{'s' if report['trials'] > 1 else ''} a length"
    return _figure(
        f"{report['model']}: facts found", f"{form}{shared}; {documents}", panels, "RdYlBu", "share of right answers",
        width=max(2.4, 0.62 * len(lengths) + 0.6) * len(panels) + 2.0, height=max(3.6, 0.28 * needles + 2.0),
        x=("length (tokens)", [format_count(length) for length in lengths], 60 if len(lengths) > 6 else 0),
        y=("depth in the document", [f"{(2 * index + 1) / (2 * needles):.0%}" for index in range(needles)], 0),
    )  # fmt: skip


def _recall(report: dict[str, Any]) -> Figure:
    variant = next((variant for variant in report["variants"] if variant.get("heads")), None)
    if variant is None:
        raise UserError("picture: nothing to draw: no variant of this result is sparse")
    panels = []
    for name in ("held-out recall", "estimated recall", "density"):
        grid = np.array(variant["heads"][name.replace(" ", "_").replace("-", "_")], float)
        panels.append((f"{name}\nmean {grid.mean():.1%}, lowest {grid.min():.1%}", grid))
    layers, heads = grid.shape
    return _figure(
        f"{report['model']}: {variant['name']} prefill of {report['tokens']:,} tokens",
        f"{variant['same_top1']} of {report['next']} next tokens as dense", panels, "viridis",
        "share of mass or of pairs",
        width=max(2.4, 0.16 * heads + 0.8) * len(panels) + 1.6, height=max(3.6, 0.16 * layers + 2.0),
        x=("query head", list(map(str, range(heads))), 0), y=("layer", list(map(str, range(layers))), 0),
    )  # fmt: skip


def _pinned(report: dict[str, Any]) -> Figure:
    """Draw the logit error over the pinned length: the largest as a line, the mean dashed, dense and sparse."""
    figure = empty_figure(6.4, 4.4)
    axis = figure.subplots()
    for is_sparse, colour in ((False, "#2166ac"), (True, "#b2182b")):
        entries = [entry for entry in report["pinned"] if entry["sparse"] == is_sparse]
        stretches = [entry["scale_len"] / report["tokens"] for entry in entries]
        for name, style in (("max", "-"), ("mean", "--")) if entries else ():
            errors = [entry[f"logit_error_{name}"] for entry in entries]
            label = f"{'sparse' if is_sparse else 'dense'}, {name}"
            axis.plot(stretches, errors, style, color=colour, marker="o", label=label)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0.0)
    axis.set_xlabel("pinned length over the document's own")
    axis.set_ylabel("max|difference| / max|logit|")
    axis.legend(frameon=False)
    figure.suptitle(f"{report['model']}: length scale pinned\n{report['tokens']:,} tokens", fontsize=12)
    return figure


def _figure(
    title: str, details: str, panels: Sequence[tuple[str, Grid]], colours: str, scale: str, *, width: float,
    height: float, x: Labels, y: Labels,
) -> Figure:  # fmt: skip
    """Return panels (title and values) side by side with one colour scale; sizes in inches. Raises UserError."""
    figure = empty_figure(width, height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, values) in zip(axes, panels, strict=True):
        image = _heat_map(axis, values, colours)
        axis.set_title(name, fontsize=11)
        _label(axis.xaxis, *x)
        axis.tick_params(axis="y", left=axis is axes[0])
    _label(axes[0].yaxis, *y)
    figure.colorbar(image, ax=list(axes), label=scale, fraction=0.03, pad=0.015, aspect=25)
    lines = [line for text in (title, details) for line in wrap(text, int(width * 10))]
    figure.suptitle("\n".join(lines), fontsize=12)
    return figure


def _heat_map(axis: Any, values: Grid, colours: str) -> Any:
    """Draw values as coloured fields, those that are missing in grey, with thin white lines between them."""
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=_FAILED)
    image = axis.imshow(values, cmap=palette, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    if max(values.shape) <= 64:  # on more fields the lines would hide the colours
        axis.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)
    for column in np.flatnonzero(np.isnan(values).all(axis=0)):
        axis.text(column, (len(values) - 1) / 2, "no result", rotation=90, ha="center", va="center", fontsize=8)
    return image


def _label(axis: Any, name: str, labels: list[str], rotation: int) -> None:
    """Name an axis and set the labels of its ticks, every n-th where all of them would touch."""
    axis.set_label_text(name)
    step = -(-len(labels) // _MAX_LABELS)
    axis.set_ticks(range(0, len(labels), step), labels[::step], rotation=rotation, fontsize=9)
