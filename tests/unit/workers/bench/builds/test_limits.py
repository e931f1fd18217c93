"""What is told of a build that takes too much, and the table."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from workers.bench.builds import table
from workers.bench.builds.limits import Limits, violations
from workers.bench.builds.readback import Built

GOOD = Built(168, 0, 98304, 8, Counter({"HGMMA": 24, "LDGSTS": 7, "SHFL": 10}))


def test_a_build_within_its_limits() -> None:
    assert violations(GOOD, Limits(units="own", copies=7, shuffles=10, together=1), 90) == []
    assert violations(replace(GOOD, instructions=Counter({"MOV": 1})), Limits(), 80) == []
    assert violations(replace(GOOD, stack=48, instructions=Counter({"LDL": 9})), Limits(), 80) == []
    assert violations(replace(GOOD, stack=8), Limits(stack=8), 90) == []
    assert violations(replace(GOOD, shared=99 << 10, instructions=Counter({"QMMA": 1})), Limits(units="own"), 120) == []


@pytest.mark.parametrize(
    ("change", "limits", "capability", "told"),
    [
        ({"stack": 8}, Limits(), 90, "8 bytes of stack"),
        ({"instructions": Counter({"LDL": 2})}, Limits(), 90, "2 accesses to local memory"),
        ({}, Limits(registers=128), 90, "168 registers: at most 128"),
        ({"shared": 200 << 10}, Limits(), 80, "204800 bytes of shared memory: at most 166912"),
        ({"shared": 100 << 10}, Limits(), 89, "102400 bytes of shared memory: at most 101376"),
        ({"shared": 50 << 10, "registers": 64}, Limits(together=2), 86, "51200 bytes of shared memory: 2 programs"),
        ({}, Limits(together=2), 90, "168 registers of 256 threads: 2 programs"),
        ({"registers": 64, "shared": 120 << 10}, Limits(together=2), 90, "122880 bytes of shared memory: 2 programs"),
        ({"instructions": Counter()}, Limits(units="some"), 90, "no matrix products"),
        ({"instructions": Counter({"HMMA": 1, "HGMMA": 1})}, Limits(units="own"), 90, "1 of 2 matrix products"),
        ({}, Limits(copies=8), 90, "7 asynchronous copies: at least 8"),
        ({}, Limits(shuffles=9), 90, "10 shuffles: at most 9"),
    ],
)
def test_what_is_told(change: dict[str, object], limits: Limits, capability: int, told: str) -> None:
    found = violations(replace(GOOD, **change), limits, capability)  # type: ignore[arg-type]
    assert len(found) == 1
    assert told in found[0]


ROW = {
    "launches": "rows", "kernel": "swiglu_kernel", "sm": 90, "warps": 4, "registers": 32, "stack": 0, "shared": 0,
    "instructions": 90, "mix": {"LDG": 2}, "violations": [],
}  # fmt: skip
FAILED = {"launches": "rows", "kernel": "", "sm": 80, "violations": ["not compiled: no such type"]}


def test_table(tmp_path: Path) -> None:
    table.write(tmp_path / "compile.json", [ROW, FAILED], "3.7.1", date="2030-01-01")
    lines = (tmp_path / "compile.md").read_text().splitlines()
    assert "Triton 3.7.1" in lines[0]
    assert "| rows | swiglu_kernel | 90 | 4 | 32 | 0 | 0 | 90 | LDG 2 |  |" in lines
    assert "| rows |  | 80 |  |  |  |  |  |  | not compiled: no such type |" in lines
    assert '"2030-01-01"' in (tmp_path / "compile.json").read_text()
    assert table.line(ROW) == "rows, swiglu_kernel, sm_90: 32 registers, 0 B shared"
    assert table.line(FAILED).endswith("sm_80: not compiled: no such type")


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "compile.json"
    assert table.rows_of(path, "3.7.1") == []
    table.write(path, [ROW, FAILED], "3.7.1")
    assert table.rows_of(path, "3.7.1") == [ROW, FAILED]
    assert table.rows_of(path, "3.6.0") == []
    table.write(path, [ROW], "3.7.1", build="of other code")
    assert table.rows_of(path, "3.7.1") == []


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="--only: nothing: no launches"):
        next(table.compile_all(only="nothing"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it"):
        next(table.compile_all())
