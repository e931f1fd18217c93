"""Result files that a report takes, and the line that refuses others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.report.files import Result, common_details, machine_marks, read_results, rows_of
from protos.errors import UserError
from tests.support.data.speed import bench_results


def write(folder: Path, report: Any) -> Path:
    path = folder / "x.json"
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return path


def test_a_result_says_where_it_was_measured(tmp_path: Path):
    (result,) = read_results([write(tmp_path, bench_results.decode())])
    assert result.what == "bench decode"
    assert result.details == "made-up on Made-up Processor (no AMX), 2 cores, 2026-01-02, commit abc"
    assert len(list(rows_of([result], "bench decode"))) == len(result.rows) == 8
    assert list(rows_of([result], "bench prefill")) == []


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("{", "not JSON"),
        ([], "what: None: must be one of bench prefill"),
        ({"what": "needle"}, "what: needle: must be one of"),
        ({"what": "bench decode", "rows": []}, "machine: missing"),
        ({"what": "recall", "model": "x"}, "variants: missing"),
    ],
)
def test_other_files_are_refused(report: Any, expected: str, tmp_path: Path):
    with pytest.raises(UserError, match=expected):
        read_results([write(tmp_path, report)])


def test_a_file_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing\.json: cannot be read"):
        read_results([tmp_path / "nothing.json"])


def test_several_machines_are_named_and_one_is_not():
    one = Result(Path("a"), bench_results.decode())
    other = Result(Path("b"), bench_results.decode() | {"machine": bench_results.MACHINE | {"has_amx": True}})
    assert machine_marks([one, one]) == {one.machine: ""}
    assert machine_marks([one, other])[other.machine] == ", Made-up Processor (AMX), 2 cores"
    assert common_details([one, one]) == one.details
    assert common_details([one, other]) == f"{one.details}; {other.details}"
