"""Cells of tables, marks of disturbed rows, notes."""

from __future__ import annotations

from typing import Any

from cluster.bench.speed.repeats import summarise
from cluster.bench.speed.tables import cells, notes, value


def report(*rows: dict[str, Any], what: str = "bench prefill", **more: Any) -> dict[str, Any]:
    machine = {"processor": "EPYC", "cores": 2}
    return {
        "what": what,
        "rows": list(rows),
        "machine": machine,
        "config": {"max_others": 0.05},
        "complete": True,
        **more,
    }


def row(*seconds: float, disturbed: int = 0, **more: Any) -> dict[str, Any]:
    runs = [
        {"first_token_s": s, "prefill_tokens_per_s": 4096 / s, "others": 0.3 if n < disturbed else 0.0,
         "disturbed": n < disturbed}
        for n, s in enumerate(seconds)
    ]  # fmt: skip
    return {"mode": "dense", "stages": 1, "shards": 1, "length": 4096, **more, **summarise(runs)}


def test_columns_without_content_are_left_out():
    header, rows = cells(report(row(2.0, 2.2, 2.1)))
    assert header == ["mode", "stages x shards", "tokens", "first token, s", "prefill, tokens/s"]
    assert rows == [["dense", "1 x 1", "4K", "2.10 (2.00 to 2.20)", "1,950"]]


def test_memory_stands_beside_what_was_planned():
    measured = row(2.0, memory={"peak_bytes": 3 << 29, "planned_bytes": 1 << 30})
    header, rows = cells(report(measured))
    assert dict(zip(header, rows[0], strict=True))["peak memory, GiB (planned)"] == "1.50 (1.00)"


def test_disturbed_repeats_are_shown():
    some, every = row(9.0, 2.0, 2.0, disturbed=1), row(3.0, disturbed=1)
    header, rows = cells(report(some, every))
    assert header[-1] == "disturbed; others"
    assert [cell[-1] for cell in rows] == ["1 of 3; 30%", "all; 30%"]
    assert rows[0][3] == "2.00"
    text = " ".join(notes(report(some, every)))
    assert "more than 5% of the cores" in text
    assert "never measured on a quiet machine" in text
    assert "never" not in " ".join(notes(report(some)))


def test_scaling_marks_processes_that_take_turns():
    scaling = report(row(2.0, kind="strong", oversubscribed=True, stages=4, efficiency=0.5, bubbles={"share": 0.04}),
                     what="bench scaling", complete=False)  # fmt: skip
    header, rows = cells(scaling)
    shown = dict(zip(header, rows[0], strict=True))
    assert (shown["stages x shards"], shown["efficiency"], shown["bubbles"]) == ("4 x 1 *", "50.0%", "4.0%")
    text = " ".join(notes(scaling))
    assert "take turns" in text
    assert "cut off" in text


def test_a_figure_that_is_missing_is_empty():
    assert value(row(1.0), "decode_ms") == ""
    assert value(row(1.0), "first_token_s", "{:.1f}") == "1.0"
