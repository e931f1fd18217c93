"""A timeline of the chunks of one prompt over the shards that computed them, with the time in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cluster.bench.report.files import Result
from cluster.bench.timeline.figures import bubbles, by_shard
from cluster.bench.timeline.trace import ChunkTime, from_json
from cluster.common.units import format_count
from cluster.tools.figures import COLOURS, empty_figure, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EVEN, _ODD, _IDLE, _OUTSIDE = COLOURS[0], COLOURS[5], COLOURS[1], "#eeeeee"
_HEIGHT = 0.72  # of a bar, of the distance between two


def layout_name(stages: int, shards: int) -> str:
    """Return a layout in words, such as `2 stages x 1 shard`."""
    return f"{stages} stage{'s' * (stages > 1)} x {shards} shard{'s' * (shards > 1)}"


def timelines(results: Sequence[Result]) -> list[tuple[Result, dict[str, Any]]]:
    """Return the rows with a timeline of several shards: of strong scaling where there are any, else of all."""
    rows = [
        (result, row) for result in results if result.what == "bench scaling"
        for row in result.rows if row.get("timeline") and row["stages"] * row["shards"] > 1
    ]  # fmt: skip
    return [(result, row) for result, row in rows if row["kind"] == "strong"] or rows


def gantt_figure(result: Result, row: Mapping[str, Any]) -> Figure:
    """Draw the chunks of the last repeat of a row: one line a shard, idle time between chunks in another colour."""
    chunks = from_json(row["timeline"])
    shards = by_shard(chunks)
    begin, end = min(chunk.input_s for chunk in chunks), max(chunk.ended_s for chunk in chunks)
    figure = empty_figure(8.4, 1.9 + 0.55 * len(shards))
    axis = figure.subplots()
    for line, own in enumerate(shards.values()):
        _line(axis, line, own, begin, end)
    axis.set_yticks(range(len(shards)), [f"stage {stage}, shard {rank}" for stage, rank in shards])
    axis.invert_yaxis()
    axis.set_xlim(0.0, end - begin)
    axis.set_xlabel("seconds since the first chunk began")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    _legend(axis)
    found, count = bubbles(chunks), len({chunk.start for chunk in chunks})
    layout = layout_name(row["stages"], row["shards"])
    title = f"{format_count(row['length'])} tokens in {count} chunks over {layout}: {found['share']:.1%} bubbles"
    note = " More threads than cores: the processes take turns." if row.get("oversubscribed") else ""
    disturbed = " Other programs disturbed every repeat." if row.get("all_disturbed") else ""
    titled(figure, title, f"{result.details}.{note}{disturbed}")
    return figure


def _line(axis: Any, line: int, own: Sequence[ChunkTime], begin: float, end: float) -> None:
    low = line - _HEIGHT / 2
    outside = [(0.0, own[0].input_s - begin), (own[-1].ended_s - begin, end - own[-1].ended_s)]
    axis.broken_barh(outside, (low, _HEIGHT), facecolors=_OUTSIDE)
    idle = [(before.ended_s - begin, max(0.0, after.input_s - before.ended_s)) for before, after in pairwise(own)]
    axis.broken_barh(idle, (low, _HEIGHT), facecolors=_IDLE)
    for parity, colour in enumerate((_EVEN, _ODD)):
        bars = [(chunk.input_s - begin, chunk.busy_s) for chunk in own[parity::2]]
        axis.broken_barh(bars, (low, _HEIGHT), facecolors=colour)


def _legend(axis: Any) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(color=_EVEN, label="chunk"), Patch(color=_ODD, label="next chunk"), Patch(color=_IDLE, label="bubble"),
        Patch(color=_OUTSIDE, label="before the first, after the last"),
    ]  # fmt: skip
    axis.legend(handles=entries, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False, fontsize=9)
