"""Faults put into running heads from outside; `python -m cluster.bench faults` runs those there is no time for here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.bench.faults.rig import Rig
from cluster.bench.faults.suite import FAULTS, Fault, run_fault

CORE = [fault for fault in FAULTS if fault.in_core]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(tmp_path_factory.mktemp("faults"), full=False)
    yield made
    made.close()


@pytest.mark.parametrize("fault", CORE, ids=lambda fault: fault.name)
def test_a_fault(rig: Rig, fault: Fault) -> None:
    row = run_fault(fault, rig, seed=1)
    assert row["passed"], row["problems"]
