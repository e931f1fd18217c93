"""Time that passes evenly."""

from __future__ import annotations

import time

import pytest

from cluster.common.steady_clock import SteadyClock


@pytest.mark.parametrize("jump", [86_400.0, 5.0, -5.0, -86_400.0, -1e9])
def test_a_jump_of_the_machines_clock_changes_nothing(jump: float) -> None:
    wall, monotonic = 1_700_000_000.0, 50.0
    clock = SteadyClock(lambda: wall, lambda: monotonic)
    assert clock() == wall
    wall, monotonic = wall + jump, monotonic + 2.0
    assert clock() == 1_700_000_002.0
    assert SteadyClock(lambda: wall, lambda: monotonic)() == wall, "the next process takes the clock as it is"


def test_it_agrees_with_the_machine() -> None:
    clock = SteadyClock()
    assert abs(clock() - time.time()) < 1.0
    assert clock() <= clock()
