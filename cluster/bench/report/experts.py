"""The load of experts by layer, and how unevenly shards share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.bench.report.files import Result
from cluster.common.units import format_count
from cluster.tools.figures import COLOURS, empty_figure, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def expert_rows(results: Sequence[Result]) -> tuple[Result, dict[str, Any]] | None:
    """Return the row whose experts are drawn: of most shards a stage, then of the longest prompt; None without any."""
    rows = [
        (result, row) for result in results if result.what == "bench scaling" for row in result.rows if "experts" in row
    ]
    return max(rows, key=lambda pair: (pair[1]["shards"], pair[1]["length"]), default=None)


def experts_figure(result: Result, row: Mapping[str, Any]) -> Figure:
    """Draw tokens of every expert over the mean of its layer, and the busiest shard over the mean of shards."""
    experts = row["experts"]
    tokens = np.array(experts["tokens"], float)
    relative = tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1e-9)
    several = row["shards"] > 1
    figure = empty_figure(8.4, max(3.2, 1.9 + 0.22 * len(tokens)))
    axes = figure.subplots(1, 2, width_ratios=(4, 1.3), squeeze=False)[0] if several else [figure.subplots()]
    image = axes[0].imshow(relative, cmap="cividis", aspect="auto", vmin=0.0, interpolation="nearest")
    layers = experts["layers"]
    step = -(-len(layers) // 16)
    axes[0].set_yticks(range(0, len(layers), step), list(map(str, layers[::step])))
    axes[0].set_xlabel("expert")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0], label="tokens over the layer's mean", pad=0.02)
    if several:
        bars, places = experts["imbalance"], range(len(layers))
        axes[1].barh(places, [value - 1 for value in bars], left=1.0, color=COLOURS[0], height=0.7)
        axes[1].set_yticks(range(0, len(layers), step), list(map(str, layers[::step])))
        axes[1].invert_yaxis()
        axes[1].set_xlim(1.0, max(1.05, *bars) + 0.02)
        axes[1].set_xlabel(f"busiest of {row['shards']} shards\nover their mean")
        axes[1].spines[["top", "right"]].set_visible(False)
    title = f"Load of experts in a prefill of {format_count(row['length'])} tokens"
    titled(figure, title, f"{result.details}; random ids")
    return figure
