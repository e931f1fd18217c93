"""Pictures of evaluation results: depth x length for needles, layer x head for recall. matplotlib is imported late."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cluster.common.units import format_count
from cluster.tools.eval.tables import depth_scores
from protos.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCORES = "RdYlBu"  # red is lost, blue is found; colour-blind readers can distinguish them
_SHARES = "viridis"
_FAILED = "#d9d9d9"
_DPI = 150
_MAX_LABELS = 16  # on one axis

Grid = npt.NDArray[np.float64]


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a result as PNG.

    Raises:
        UserError: matplotlib is not installed, or there is nothing to draw.
    """
    figure = _needles(report) if report["what"] == "needle" else _recall(report)
    figure.savefig(path, dpi=_DPI, format="png")


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that belongs to no window and no global state. Raises UserError."""
    if not has_matplotlib():
        raise UserError("picture: needs matplotlib: pip install 'longreach[eval]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _needles(report: dict[str, Any]) -> Figure:
    modes, lengths, needles = list(report["modes"]), report["lengths"], report["needles"]
    panel = max(2.4, 0.62 * len(lengths) + 0.6)
    figure = _figure(panel * len(modes) + 2.0, max(3.6, 0.28 * needles + 2.0))
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    depths = [f"{(2 * index + 1) / (2 * needles):.0%}" for index in range(needles)]
    image = None
    for axis, mode in zip(axes, modes, strict=True):
        scores = np.array([depth_scores(report, mode, length) for length in lengths], float).T  # None becomes NaN
        image = _heat_map(axis, scores, _SCORES)
        known = scores[~np.isnan(scores)]
        axis.set_title(f"{mode}\n{known.mean():.0%} right" if known.size else f"{mode}\nnot run", fontsize=11)
        _label(axis.xaxis, [format_count(length) for length in lengths], rotate=len(lengths) > 6)
        axis.set_xlabel("length (tokens)")
        for column in np.flatnonzero(np.isnan(scores).all(axis=0)):
            axis.text(column, (needles - 1) / 2, "no result", rotation=90, ha="center", va="center", fontsize=8)
    _label(axes[0].yaxis, depths)
    axes[0].set_ylabel("depth in the document")
    assert image is not None
    _finish(figure, axes, image, "share of right answers")
    form = "answer begun in the prompt" if report["form"] == "prompt" else "question and answer"
    shared = ", half of the needles share a word" if report["shared_words"] else ""
    documents = f"{report['trials']} document{'s' if report['trials'] > 1 else ''} a length"
    _title(figure, f"{report['model']}: facts found", f"{form}{shared}; {documents}")
    return figure


def _recall(report: dict[str, Any]) -> Figure:
    variant = next((variant for variant in report["variants"] if variant.get("heads")), None)
    if variant is None:
        raise UserError("picture: nothing to draw: no variant of this result is sparse")
    panels = (("held_out_recall", "held-out recall"), ("estimated_recall", "estimated recall"), ("density", "density"))
    grids = [np.array(variant["heads"][key], float) for key, _ in panels]
    layers, heads = grids[0].shape
    figure = _figure(3 * max(2.4, 0.16 * heads + 0.8) + 1.6, max(3.6, 0.16 * layers + 2.0))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image = None
    for axis, grid, (_, title) in zip(axes, grids, panels, strict=True):
        image = _heat_map(axis, grid, _SHARES)
        axis.set_title(f"{title}\nmean {grid.mean():.1%}, lowest {grid.min():.1%}", fontsize=11)
        _label(axis.xaxis, [str(head) for head in range(heads)])
        axis.set_xlabel("query head")
    _label(axes[0].yaxis, [str(layer) for layer in range(layers)])
    axes[0].set_ylabel("layer")
    assert image is not None
    _finish(figure, axes, image, "share of mass or of pairs")
    _title(
        figure, f"{report['model']}: {variant['name']} prefill of {report['tokens']:,} tokens",
        f"{variant['same_top1']} of {report['next']} next tokens as dense",
    )  # fmt: skip
    return figure


def _title(figure: Figure, name: str, details: str) -> None:
    width = int(figure.get_figwidth() * 10)  # characters of this size on a line
    figure.suptitle("\n".join([*wrap(name, width), *wrap(details, width)]), fontsize=12)


def _finish(figure: Figure, axes: Any, image: Any, label: str) -> None:
    """Add one colour scale for all panels; their inner vertical axes lose their ticks."""
    for axis in axes[1:]:
        axis.tick_params(axis="y", left=False)
    figure.colorbar(image, ax=list(axes), label=label, fraction=0.03, pad=0.015, aspect=25)


def _heat_map(axis: Axes, values: Grid, colours: str) -> Any:
    """Draw values 0..1 as coloured fields, those that are missing in grey, with thin white lines between them."""
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=_FAILED)
    image = axis.imshow(values, cmap=palette, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    if max(values.shape) <= 64:  # on more fields the lines would hide the colours
        axis.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def _label(axis: Any, names: list[str], rotate: bool = False) -> None:
    """Set the labels of the ticks, every n-th where all of them would touch."""
    step = -(-len(names) // _MAX_LABELS)
    shown = range(0, len(names), step)
    axis.set_ticks(list(shown), [names[index] for index in shown], rotation=60 if rotate else 0, fontsize=9)
