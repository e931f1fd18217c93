"""A plan as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from cluster.common.text_format import escape_unprintable
from cluster.common.units import format_bytes, format_count
from cluster.tools.display import plain_table

_GB = 1e9
_PRECISIONS = "+ N: with the KV of one context of N tokens"


def render_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan of `make_plan`: the answer, the memory of every shard, times, and the table of precisions."""
    for line in _head(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_shards(plan))
    console.print()
    for line in _times(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_precisions(plan))
    console.print(_PRECISIONS, highlight=False, markup=False, soft_wrap=True)
    for note in plan["notes"]:
        console.print(f"note: {escape_unprintable(note)}", highlight=False, markup=False, soft_wrap=True)


def _head(plan: dict[str, Any]) -> list[str]:
    model, layout, hardware = plan["model"], plan["layout"], plan["hardware"]
    gpus = f"{layout['devices']} x {hardware['name']}" if hardware["kind"] == "cuda" else hardware["name"]
    size = f"{format_bytes(hardware['memory_bytes'])} usable{' each' if layout['devices'] > 1 else ''}"
    split = f"{_number(layout['stages'], 'stage')} x {_number(layout['shards'], 'shard')}"
    parameters, active = model["parameters"] / _GB, model["active_parameters"] / _GB
    token = f"a token of {model['kv_dtype']} KV takes {format_bytes(model['kv_bytes_per_token'])}"
    lines = [
        f"{model['type']}: {parameters:.2f} G parameters, {active:.2f} G active; {token}",
        f"{plan['context']:,} tokens on {gpus} ({size}): {'fits' if plan['fits'] else 'does not fit'} as {split}",
    ]
    if plan["why_not"]:
        lines.append(f"why not: {escape_unprintable(plan['why_not'])}")
    return [*lines, f"longest context that fits so: {plan['longest_context']:,} tokens"]


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _shards(plan: dict[str, Any]) -> Any:
    table = plain_table("stage.shard", "layers", "params", "weights", "KV", "scratch", "process", "total")
    for shard in plan["memory"]["shards"]:
        sizes = (format_bytes(shard[f"{name}_bytes"]) for name in ("weight", "kv", "scratch", "process", "total"))
        table.add_row(
            f"{shard['stage']}.{shard['rank']}", str(shard["layers"]), f"{shard['parameters'] / _GB:.3f} G", *sizes
        )
    return table


def _times(plan: dict[str, Any]) -> list[str]:
    prefill, decode, context = plan["prefill_s"], plan["decode_s"], plan["context"]
    if prefill["dense"] is None:
        return ["times: unknown without the name of the hardware (--gpu), or measured steps of a head"]
    names = ("dense", "sparse")
    read = (f"{name} {prefill[name]:,.1f} s ({context / prefill[name]:,.0f} tokens/s)" for name in names)
    return [
        f"predicted prefill: {'; '.join(read)}",
        f"predicted decode at that context: {decode * 1e3:,.1f} ms a token",
        f"from: {escape_unprintable(plan['times_from'])}",
    ]


def _precisions(plan: dict[str, Any]) -> Any:
    rows = plan["precisions"]
    table = plain_table("weights, GB", "alone", *(f"+ {format_count(int(context))}" for context in rows[0]["totals"]))
    for row in rows:
        table.add_row(
            row["precision"],
            *(f"{size / _GB:.{1 if size >= _GB else 3}f}" for size in (row["weight_bytes"], *row["totals"].values())),
        )
    return table
