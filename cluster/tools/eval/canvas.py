"""Empty figures of matplotlib, which is optional and imported late."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from protos.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure of no window, with no global state; sizes in inches. Raises UserError."""
    if not has_matplotlib():
        raise UserError("picture: needs matplotlib: pip install 'longreach[eval]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
