"""Scores against cases counted by hand, intervals against published values."""

from __future__ import annotations

import random

import pytest

from cluster.tools.eval.ruler.scoring import average, design_effect, differences, interval, mean_of_groups, score


@pytest.mark.parametrize(
    ("answer", "outputs", "match", "expected"),
    [
        (" 1234567, 7654321 and 1111111.", ("1234567", "7654321"), "all", 1.0),
        ("1234567", ("1234567", "7654321", "1111111", "2222222"), "all", 0.25),
        ("123456 7", ("1234567",), "all", 0.0),
        ("BRAVE apple", ("Apple", "brave"), "all", 1.0),  # whatever the case
        ("AbcdeX", ("ABCDE",), "all", 1.0),  # inside another word counts, as it does for RULER
        ("", ("x",), "all", 0.0),
        ("It is Paris.", ("paris", "Lutetia"), "any", 1.0),
        ("London", ("paris", "Lutetia"), "any", 0.0),
    ],
)
def test_scores(answer: str, outputs: tuple[str, ...], match: str, expected: float) -> None:
    assert score(answer, outputs, match) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),  # Wilson's interval, as Newcombe (1998) prints it
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    assert interval([1.0] * right + [0.0] * (count - right)) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_interval_covers_the_truth(share: float) -> None:
    """In about 95 of 100 draws of 20; partial scores are covered at least as often."""
    rng = random.Random(5)
    covered = partial = 0
    for _ in range(2000):
        low, high = interval([float(rng.random() < share) for _ in range(20)])
        covered += low <= share <= high
        low, high = interval([sum(rng.random() < share for _ in range(4)) / 4 for _ in range(20)])
        partial += low <= share <= high
    assert 0.92 <= covered / 2000 <= 0.98
    assert partial / 2000 > 0.99


def test_averages_are_not_certain_of_what_is_all_right() -> None:
    mean, reach = average([[1.0] * 16, [0.0, 0.0, 1.0, 0.5]])
    assert mean == (1.0 + 0.375) / 2
    first, second = (0.9 * 0.1 / 20), (3.5 / 8) * (4.5 / 8) / 8
    assert reach == pytest.approx(1.959964 * (first + second) ** 0.5 / 2)


def test_means_of_groups() -> None:
    mean, reach = mean_of_groups([[0.0, 1.0], [1.0, 1.0]])
    assert mean == 0.75
    assert reach == pytest.approx(1.959964 * (0.5 / 2) ** 0.5 / 2)
    assert mean_of_groups([[0.25]]) == (0.25, 0.0)


def test_differences_are_paired() -> None:
    first = {"vt": [1.0, 0.5, 0.0], "cwe": [1.0, 1.0, 1.0], "fwe": [1.0]}
    second = {"vt": [0.75, 0.25, -0.25], "cwe": [1.0, 1.0, 1.0], "qa": [0.0]}
    assert differences(first, second) == (0.125, 0.0)  # always the same: no interval
    assert differences({"vt": [1.0]}, {"cwe": [1.0]}) is None
    assert differences({"vt": [1.0]}, {"vt": [1.0, 0.0]}) is None


def test_samples_of_one_haystack_count_less_where_haystacks_differ() -> None:
    apart = [1.0] * 4 + [0.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert design_effect(apart, 4) == 4.0
    assert interval(apart, 4) == pytest.approx(interval([1.0, 0.0, 1.0, 0.0]))
    alike = [1.0, 0.0, 1.0, 0.0] * 4
    assert design_effect(alike, 4) == 1.0
    assert interval(alike, 4) == interval(alike)
    assert average([apart], 4)[1] == pytest.approx(average([[1.0, 0.0, 1.0, 0.0]])[1])
    assert differences({"vt": apart}, {"vt": [0.0] * 16}, 4)[1] == pytest.approx(2 * mean_of_groups([apart])[1])  # type: ignore[index]
    for scores, cluster in (([1.0] * 8, 4), ([1.0, 0.0], 2), (apart, 1)):
        assert design_effect(scores, cluster) == 1.0


def test_the_design_effect_on_average() -> None:
    """Scores of haystacks with 30 and 70 % right: the correlation is 0.16, so the effect is 1 + 9 * 0.16."""
    rng = random.Random(7)
    found = []
    for _ in range(300):
        shares = [rng.choice((0.3, 0.7)) for _ in range(40)]
        found.append(design_effect([float(rng.random() < share) for share in shares for _ in range(10)], 10))
    assert sum(found) / len(found) == pytest.approx(1 + 9 * 0.16, abs=0.1)
