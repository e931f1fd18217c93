"""Medians, spread, and repeats that others disturbed."""

from collections.abc import Iterator

import pytest

from cluster.bench.speed.machine import LoadOfOthers, Mark
from cluster.bench.speed.repeats import Repeats, figure, spread, summarise


class Scripted(LoadOfOthers):
    """Says what others used in each repeat."""

    def __init__(self, shares: list[float]) -> None:
        object.__setattr__(self, "shares", iter(shares))

    shares: Iterator[float]

    def mark(self) -> Mark:
        return Mark(0.0, 0.0, 0.0)

    def since(self, mark: Mark) -> float:
        return next(self.shares)


def test_every_repeat_says_what_others_used():
    runs = Repeats(3).run(lambda n: {"s": n + 1.0}, Scripted([0.0, 0.06, 0.05]))
    assert [(run["s"], run["others"], run["disturbed"]) for run in runs] == [
        (1.0, 0.0, False), (2.0, 0.06, True), (3.0, 0.05, False),
    ]  # fmt: skip


def test_disturbed_repeats_are_made_again_as_often_as_allowed():
    told: list[int] = []
    runs = Repeats(2, retries=5).run(lambda n: {"s": 1.0}, Scripted([0.5, 0.0, 0.5, 0.0, 0.0]), told.append)
    assert [run["disturbed"] for run in runs] == [True, False, True, False]
    assert told == [0, 1, 2, 3]
    assert len(Repeats(2, retries=1).run(lambda n: {"s": 1.0}, Scripted([0.5] * 3))) == 3


def test_a_measurement_may_say_itself_what_others_used():
    (run,) = Repeats(1).run(lambda n: {"s": 1.0, "others": 0.01}, Scripted([0.9]))
    assert (run["others"], run["disturbed"]) == (0.01, False)


def test_engines_take_turns_and_a_disturbed_one_repeats_all():
    order: list[str] = []

    def engine(name: str):
        return lambda n: order.append(f"{name}{n}") or {"s": 1.0}

    runs = Repeats(1, retries=1).run_in_turns({"a": engine("a"), "b": engine("b")}, Scripted([0.0, 0.9, 0.0, 0.0]))
    assert order == ["a0", "b0", "a1", "b1"]
    assert [len(done) for done in runs.values()] == [2, 2]


def test_a_summary_counts_quiet_repeats_only():
    runs = [
        {"s": 1.0, "name": "x", "others": 0.0, "disturbed": False},
        {"s": 9.0, "name": "x", "others": 0.4, "disturbed": True},
        {"s": 3.0, "name": "x", "others": 0.01, "disturbed": False},
    ]
    row = summarise(runs)
    assert row["figures"] == {"s": {"median": 2.0, "min": 1.0, "max": 3.0, "mad": 1.0}}
    assert (row["repeats"], row["disturbed"], row["all_disturbed"], row["others_max"]) == (3, 1, False, 0.4)
    assert row["runs"] == runs
    assert figure(row, "s") == 2.0
    assert figure(row, "other") is None


def test_a_summary_of_disturbed_repeats_alone_says_so():
    row = summarise([{"s": 5.0, "others": 0.4, "disturbed": True}])
    assert row["all_disturbed"]
    assert figure(row, "s") == 5.0


@pytest.mark.parametrize(("values", "median", "mad"), [([4.0], 4.0, 0.0), ([1, 2, 9], 2, 1), ([1, 2, 3, 100], 2.5, 1)])
def test_spread(values: list[float], median: float, mad: float):
    assert spread(values) == {"median": median, "min": min(values), "max": max(values), "mad": mad}
