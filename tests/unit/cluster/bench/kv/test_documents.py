"""What a second try may compute and take."""

from __future__ import annotations

import pytest

from cluster.bench.kv.documents import judge_retry, retry_row
from cluster.bench.kv.rig import Asked, Bounds
from cluster.client.models import Answer, Progress


def asked(seconds: float, cached: int) -> Asked:
    return Asked(seconds, seconds, [], [seconds], Answer("", "", None, "length", (1,), 1000, cached, Progress()))


@pytest.mark.parametrize(
    ("given_up_at", "cached", "seconds", "met"),
    [(0.6, 560, 4.4, [True, True]), (0.62, 540, 4.6, [False, False]), (0.5, 460, 5.4, [True, True])],
)
def test_who_gives_up_sooner_may_compute_more(
    given_up_at: float, cached: int, seconds: float, met: list[bool]
) -> None:  # fmt: skip
    row = retry_row("cancel", given_up_at, asked(10.0, 0), asked(seconds, cached))
    assert (row["computed_share"], row["time_share"]) == pytest.approx((1 - cached / 1000, seconds / 10))
    bounds = Bounds()
    judge_retry(bounds, row)
    assert [entry["met"] for entry in bounds.rows] == met
