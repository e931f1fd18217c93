"""The list of faults is the documented one, and a fault that breaks is a result."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.bench.faults.rig import Rig, Verdict, merged
from cluster.bench.faults.suite import FAULTS, Fault, run_fault
from tests.support.paths import ROOT


def test_the_faults_are_those_of_the_documentation() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    assert rows == [(str(number), fault.name) for number, fault in enumerate(FAULTS, 1)]
    assert len({fault.name for fault in FAULTS}) == 36


def test_every_fault_says_what_it_is() -> None:
    assert [fault.name for fault in FAULTS if not fault.text.endswith(".")] == []


def test_a_fault_that_breaks_is_a_result(tmp_path: Path) -> None:
    def breaks(rig: Rig, seed: int) -> Verdict:
        """Break."""
        raise TimeoutError(f"seed {seed}")

    row = run_fault(Fault(breaks), Rig(tmp_path), 3)
    assert (row["passed"], row["problems"]) == (False, ["TimeoutError: seed 3"])


def test_settings_are_merged_by_key() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": 5}) == {"a": {"b": 1, "c": 4}, "d": 3, "e": 5}
