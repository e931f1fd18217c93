"""Which reports of progress count, and how far off they are."""

from __future__ import annotations

import pytest

from cluster.bench.planning.eta import rows_of


def test_the_first_report_at_each_tenth():
    seen = [(10.0, 0.0, None), (12.0, 0.05, 30.0), (14.0, 0.11, 20.0), (15.0, 0.19, 19.0), (20.0, 0.55, 9.0)]
    rows = rows_of(seen, 30.0)
    assert [(row["share"], row["predicted_s"], row["true_s"]) for row in rows] == [
        (0.11, 20.0, 16.0), *[(0.55, 9.0, 10.0)] * 4,
    ]  # fmt: skip
    assert rows[0]["error"] == 0.25
    assert rows[-1]["error"] == pytest.approx(-0.1)


def test_reports_without_a_prediction_are_left_out():
    assert rows_of([(1.0, 0.1, None), (2.0, 1.0, 0.0)], 2.0) == []
