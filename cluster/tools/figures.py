"""What pictures of results share: figures without windows and global state, colours, axes of token counts."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from cluster.common.units import format_count
from protos.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours, which colour-blind readers can tell apart; lines differ in their markers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
_COLOURS_OF_PNG = 256  # the most a palette has
_DENSE_TICKS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
_SMALL, _LETTERS_AN_INCH = 8, 15  # points of the line below a figure, and letters of it an inch


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure of no window, with no global state; sizes in inches. Raises UserError without matplotlib."""
    if not has_matplotlib():
        raise UserError("picture: needs matplotlib: pip install 'longreach[eval]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, or as PNG of 256 colours, a third of the bytes, as the name of the file says."""
    if path.suffix == ".svg":
        figure.savefig(path, format="svg", metadata={"Date": None})
        return
    from PIL import Image  # matplotlib needs it too

    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(_COLOURS_OF_PNG, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", optimize=True)


def titled(figure: Figure, title: str, details: str) -> None:
    """Put a title over a figure, and what was measured where below it."""
    figure.suptitle(title, fontsize=13, fontweight="bold")
    width = int(_LETTERS_AN_INCH * figure.get_figwidth())
    lines = [part for line in details.split("\n") for part in wrap(line, width)]
    figure.supxlabel("\n".join(lines), fontsize=_SMALL, color=GREY)


def plain_axes(axis: Any) -> Any:
    """Remove what nobody reads from axes, and add a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    return axis


def token_axis(axis: Any, counts: Iterable[int], label: str) -> None:
    """Make the x axis one of token counts, logarithmic, with a tick at each of them."""
    ticks = sorted(set(counts))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [format_count(count) for count in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)


def log_axis(axis: Any, side: str, percent: bool = False, dense: bool = False) -> None:
    """Make the `x` or `y` axis logarithmic, with plain numbers or percents at 1, 2 and 5 of every power of ten.

    Args:
        dense: ticks at 1, 1.2, 1.5, 2, 2.5 and the digits from 3 on, for values within one power of ten.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axis, f"set_{side}scale")("log")
    ticks = getattr(axis, f"{side}axis")
    ticks.set_major_locator(LogLocator(subs=_DENSE_TICKS if dense else (1.0, 2.0, 5.0)))
    ticks.set_major_formatter(lambda value, _: f"{100 * value:g}%" if percent else f"{value:g}")
    ticks.set_minor_formatter(NullFormatter())
