"""Efficiency of more stages by simulation: fixed and dynamic chunks, as a table and as series to plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.simulation.pipeline import Bar, Run, simulate
from cluster.config.deployment import Deployment
from cluster.latency.measured import Costs
from cluster.planner.memory import relayout
from cluster.planner.subject import as_dense, as_sparse, with_chunks
from protos.errors import UserError

PUBLISHED = {  # strong scaling of prefill over stages of GPUs: www.lmsys.org/blog/2026-01-15-chunked-pipeline
    "fixed": {"stages": [8], "efficiency": [0.696]},
    "dynamic": {"stages": [8], "efficiency": [0.769]},
    "either": {"stages": [4], "efficiency": [0.828]},  # the source does not say which
}
_GANTT_STAGES = 4  # of the timeline that a file has


def study(
    deployment: Deployment, costs_of: Callable[[Deployment], Costs], context: int, stages: Sequence[int], sparse: bool
) -> dict[str, Any]:  # fmt: skip
    """Return a row for each number of stages: seconds, efficiency and bubbles with fixed and with dynamic chunks.

    Efficiency is the time of one stage with fixed chunks over stages times the time; the costs of one stage hold for
    all, as if each had hardware of its own. Raises UserError: more stages than layers.
    """
    given = as_sparse(deployment) if sparse else as_dense(deployment)
    layers = given.spec.num_hidden_layers
    if (most := max(stages)) > layers:
        raise UserError(f"--stages: {most}: must be at most {layers}, the layers of the model")
    costs = costs_of(relayout(given, 1, 1))
    one = simulate(relayout(given, 1, 1), costs, context).seconds
    rows: list[dict[str, Any]] = []
    timelines: dict[str, Any] = {}
    for number in stages:
        split = relayout(given, number, 1)
        runs = {
            name: simulate(with_chunks(split, is_dynamic), costs, context)
            for name, is_dynamic in (("fixed", False), ("dynamic", True))
        }
        rows.append({"stages": number} | {name: _figures(run, number, one) for name, run in runs.items()})
        if number == _GANTT_STAGES:
            timelines = {name: [list(bar) for bar in run.bars] for name, run in runs.items()}
    plot = {
        name: {"stages": list(stages), "efficiency": [row[name]["efficiency"] for row in rows]}
        for name in ("fixed", "dynamic")
    }
    return {
        "context": context, "chunk": given.config.prefill.max_num_batched_tokens, "sparse": sparse,
        "costs": list(costs.seconds), "times_from": costs.source, "rows": rows,
        "plot": plot | {"published": PUBLISHED},
        "timelines": {"columns": list(Bar._fields), "stages": _GANTT_STAGES} | timelines,
    }  # fmt: skip


def _figures(run: Run, stages: int, one: float) -> dict[str, Any]:
    chunks = sum(bar.stage == 0 for bar in run.bars)
    efficiency = one / (stages * run.seconds)
    return {
        "seconds": round(run.seconds, 4), "efficiency": round(efficiency, 4), "bubbles": round(run.bubbles(), 4),
        "chunks": chunks,
    }  # fmt: skip


def table(result: dict[str, Any]) -> list[str]:
    """Return the rows of a study as lines of Markdown."""
    lines = [
        "| stages | fixed: seconds | efficiency | bubbles | dynamic: seconds | efficiency | bubbles |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [str(row["stages"])]
        for name in ("fixed", "dynamic"):
            figures = row[name]
            cells += [f"{figures['seconds']:.2f}", f"{figures['efficiency']:.1%}", f"{figures['bubbles']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_study(result: dict[str, Any], path: Path) -> None:
    """Draw efficiency against stages, with the published points, and the chunks of four stages, as a picture file."""
    from matplotlib.figure import Figure

    timelines = [name for name in ("fixed", "dynamic") if name in result["timelines"]]
    figure = Figure(figsize=(8, 4 + 2 * len(timelines)), layout="constrained")
    axes = figure.subplots(1 + len(timelines), 1, squeeze=False)
    names = {"fixed": "fixed chunks", "dynamic": "dynamic chunks"}
    for name, label in names.items():
        series = result["plot"][name]
        axes[0][0].plot(series["stages"], [100 * e for e in series["efficiency"]], "o-", label=label)
    for number, (name, theirs) in enumerate(result["plot"]["published"].items()):
        label = f"{names.get(name, 'one of the two')}, published elsewhere"
        colour = "C7" if name == "either" else f"C{number}"
        axes[0][0].plot(theirs["stages"], [100 * e for e in theirs["efficiency"]], "x", color=colour, label=label)
    axes[0][0].set(xlabel="stages", ylabel="efficiency, %", ylim=(0, 105))
    axes[0][0].set_xscale("log", base=2)
    axes[0][0].minorticks_off()
    axes[0][0].set_xticks(result["plot"]["fixed"]["stages"], result["plot"]["fixed"]["stages"])
    axes[0][0].legend()
    for axis, name in zip((row[0] for row in axes[1:]), timelines, strict=True):
        for number, (stage, start, stop, *_) in enumerate(result["timelines"][name]):
            axis.barh(stage, stop - start, left=start, color=f"C{number // result['timelines']['stages'] % 2}")
        axis.set(xlabel="seconds", ylabel="stage", title=names[name])
        axis.invert_yaxis()
    axes[0][0].set_title(f"prefill of {result['context']:,} tokens, simulated; {result['times_from']}", fontsize=9)
    figure.savefig(path, dpi=120, format="png")
