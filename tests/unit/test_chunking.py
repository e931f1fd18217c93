"""How a step's tokens are shared: a table of cases, and the promises for any case."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chunking import num_steps, share_budget


@pytest.mark.parametrize(
    ("budget", "remaining", "shares"),
    [
        (8, [], []),
        (8, [0, 0], [0, 0]),
        (8, [1], [1]),
        (8, [7], [7]),
        (8, [8], [8]),
        (8, [9], [8]),
        (8, [100, 1], [7, 1]),
        (8, [100, 100], [4, 4]),
        (7, [100, 100], [4, 3]),
        (8, [100, 2], [4, 2]),
        (8, [100, 50, 2], [4, 2, 2]),
        (8, [2, 100], [2, 6]),
        (8, [100, 3, 3, 3], [4, 3, 1, 0]),
        (1, [100], [1]),
        (1, [100, 1], [0, 1]),
        (2, [1, 1, 1], [1, 1, 0]),
        (2, [100, 1, 0, 1], [1, 1, 0, 0]),
        (3, [100, 1, 0, 1], [1, 1, 0, 1]),
    ],
)
def test_cases(budget: int, remaining: list[int], shares: list[int]):
    assert share_budget(budget, remaining) == shares


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 300), st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1000)), max_size=12))
def test_promises(budget: int, remaining: list[int]):
    shares = share_budget(budget, remaining)
    assert len(shares) == len(remaining)
    assert all(0 <= share <= wanted for share, wanted in zip(shares, remaining, strict=True))
    assert sum(shares) <= budget, "the budget is kept"
    if sum(wanted > 1 for wanted in remaining) <= 1:
        assert sum(shares) == min(budget, sum(remaining)), "alone, a prefill uses all of it"
    singles = [share for share, wanted in zip(shares, remaining, strict=True) if wanted == 1]
    prefills = [(share, wanted) for share, wanted in zip(shares, remaining, strict=True) if wanted > 1]
    room = max(1, budget - 1) if prefills else budget
    assert sum(singles) == min(len(singles), room), "single tokens come first, beside a prefill they leave one"
    if prefills:
        share, wanted = prefills[0]
        assert share >= min(wanted, -(-(budget - sum(singles)) // 2)), "the oldest prefill gets at least half"
        others = sorted(prefills[1:], key=lambda pair: pair[1])
        unfinished = [share < wanted for share, wanted in others]
        assert unfinished == sorted(unfinished), "shorter ones are served before longer ones"


@pytest.mark.parametrize(("tokens", "steps"), [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2), (1009, 4)])
def test_steps_of_a_prefill(tokens: int, steps: int):
    assert num_steps(tokens, 256) == steps
