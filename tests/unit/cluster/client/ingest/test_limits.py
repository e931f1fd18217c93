"""Budgets: what is at a limit passes, what is over it does not."""

from __future__ import annotations

import pytest

from cluster.client.ingest.limits import MAX_RATIO, RATIO_FROM, Budget
from protos.errors import InvalidRequest


def test_bytes_and_files() -> None:
    budget = Budget(max_bytes=10 << 20, max_files=2)
    budget.add_file()
    budget.add_file()
    with pytest.raises(InvalidRequest, match=r"has more than 2 files: leave some out by \.gitignore"):
        budget.add_file()
    budget.spend(10 << 20)
    assert budget.left == 0
    with pytest.raises(InvalidRequest, match="has more than 10 MiB of text"):
        budget.spend(1)
    budget.hold(10 << 20)
    with pytest.raises(InvalidRequest, match="has more than 10 MiB of text"):
        budget.hold(1)


def test_ratio() -> None:
    Budget(packed_bytes=1).check_unpacked(RATIO_FROM)
    with pytest.raises(InvalidRequest, match=f"unpacks to more than {MAX_RATIO} times its size"):
        Budget(packed_bytes=1).check_unpacked(RATIO_FROM + 1)
    Budget(packed_bytes=RATIO_FROM).check_unpacked(RATIO_FROM * MAX_RATIO)
    Budget().check_unpacked(1 << 60)
