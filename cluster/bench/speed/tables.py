"""Tables of results, for the terminal and for Markdown: the same cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.bench.speed.repeats import figure
from cluster.common.units import format_count

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def value(row: Row, name: str, form: str = "{:,.2f}", with_range: bool = True) -> str:
    """Return the median of a figure with its range, such as `1.25 (1.20 to 1.31)`; "" where there is none."""
    found = row.get("figures", {}).get(name)
    if found is None:
        return ""
    median, low, high = (form.format(found[key]) for key in ("median", "min", "max"))
    return median if not with_range or low == high else f"{median} ({low} to {high})"


def disturbance(row: Row) -> str:
    """Return how many repeats were disturbed, and what others used of the cores at most; "" where none was."""
    if not row.get("disturbed"):
        return ""
    which = "all" if row["all_disturbed"] else f"{row['disturbed']} of {row['repeats']}"
    return f"{which}; {row['others_max']:.0%}"


def _share(name: str, at: Callable[[Row], Any] = lambda row: row) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = (at(row) or {}).get(name)
        return "" if found is None else f"{found:.1%}"

    return cell


def _layout(row: Row) -> str:
    mark = " *" if row.get("oversubscribed") else ""
    return f"{row['stages']} x {row['shards']}{mark}"


def _memory(row: Row) -> str:
    found = row.get("memory")
    return "" if found is None else f"{found['peak_bytes'] / 2**30:.2f} ({found['planned_bytes'] / 2**30:.2f})"


_MODE: Column = ("mode", lambda row: str(row["mode"]))
_LAYOUT: Column = ("stages x shards", _layout)
_TOKENS: Column = ("tokens", lambda row: format_count(row["length"]))
_STATE: Column = ("disturbed; others", disturbance)
_FIRST: Column = ("first token, s", lambda row: value(row, "first_token_s"))
_RATE: Column = ("prefill, tokens/s", lambda row: value(row, "prefill_tokens_per_s", "{:,.0f}", False))
_SPEEDUP: Column = ("speedup", lambda row: f"{row['speedup']:.2f}" if "speedup" in row else "")
_DECODE: Column = ("decode step, ms", lambda row: value(row, "decode_ms"))
_MEMORY: Column = ("peak memory, GiB (planned)", _memory)

COLUMNS: Mapping[str, Sequence[Column]] = {
    "bench prefill": (_MODE, _LAYOUT, _TOKENS, _FIRST, _RATE, ("pairs visited", _share("density")), _MEMORY, _STATE),
    "bench decode": (_MODE, _LAYOUT, _TOKENS, _DECODE, _MEMORY, _STATE),
    "bench scaling": (
        ("kind", lambda row: str(row["kind"])), _MODE, _LAYOUT, _TOKENS,
        ("jobs", lambda row: str(row.get("jobs", ""))),
        ("seconds", lambda row: value(row, "first_token_s") or value(row, "total_s")),
        ("tokens/s", lambda row: value(row, "prefill_tokens_per_s", "{:,.0f}", False)
         or value(row, "tokens_per_s", "{:,.0f}", False)),
        _SPEEDUP, ("efficiency", _share("efficiency")),
        ("bubbles", _share("share", lambda row: row.get("bubbles"))), _STATE,
    ),
    "bench compare": (
        ("engine", lambda row: str(row["engine"])), _MODE, _TOKENS, _FIRST, _RATE, _DECODE,
        ("first token, beside ours", lambda row: f"{row['ratio_first_token']:.2f} x"
         if "ratio_first_token" in row else ""), _STATE,
    ),
}  # fmt: skip


def cells(report: Row) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a report; columns without content are left out."""
    columns = COLUMNS[str(report["what"])]
    rows = [[cell(row) for _, cell in columns] for row in report["rows"]]
    used = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    return [columns[n][0] for n in used], [[row[n] for n in used] for row in rows]


def notes(report: Row) -> list[str]:
    """Return what a reader of the table must know: marks, disturbance, and what is missing."""
    rows, machine = report["rows"], report["machine"]
    found = [f"{machine['processor']}, {machine['cores']} cores; median (smallest to largest)"]
    if any(row.get("oversubscribed") for row in rows):
        found.append("* more threads than cores: the processes take turns, so this says nothing of scaling")
    if not report.get("complete"):
        found.append("the run was cut off: rows are missing")
    if any(row.get("disturbed") for row in rows):
        limit = report["config"]["max_others"]
        found.append(
            f"disturbed: others used more than {limit:.0%} of the cores; left out while a quiet repeat is there"
        )
    if any(row.get("all_disturbed") for row in rows):
        found.append("rows with `all` repeats disturbed were never measured on a quiet machine")
    return found


def first_token(row: Row) -> float | None:
    """Return the median seconds to the first token."""
    return figure(row, "first_token_s")
