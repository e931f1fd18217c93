"""How outcomes of jobs are judged, and that the order of kills follows the seed."""

from cluster.bench.kills import Outcome, judge, recovery_s

EXPECTED = [((1, 2, 3),), ((4,), (5, 6))]


def good(kind: int) -> Outcome:
    return Outcome(kind, "succeeded", tokens=EXPECTED[kind], streamed=EXPECTED[kind])


def test_an_undisturbed_run_counts_nothing():
    verdict = judge([good(0), good(1), good(0)], EXPECTED)
    assert verdict["jobs"] == 3
    assert not any(verdict[key] for key in ("lost", "given_up", "wrong_tokens", "wrong_streams", "other_states"))


def test_every_fault_is_counted_by_its_kind():
    outcomes = [
        good(1),
        Outcome(0, "lost", "no answer"),
        Outcome(0, "failed", "given up: the cluster was restarted"),
        Outcome(1, "succeeded", tokens=((4,), (5, 7)), streamed=((4,), (5, 7))),
        Outcome(1, "succeeded", tokens=EXPECTED[1], streamed=((4,), (5, 5, 6)), restarts=2),
        Outcome(1, "cancelled"),
        Outcome(1),
    ]
    assert judge(outcomes, EXPECTED) == {
        "jobs": 7, "lost": 1, "given_up": 1, "wrong_tokens": 1, "wrong_streams": 1, "other_states": 2,
        "restarted": 1, "largest_restarts": 2, "errors": ["given up: the cluster was restarted", "no answer"],
    }  # fmt: skip


def test_recoveries_by_kind():
    assert recovery_s([("repair", 2.0), ("new head", 9.0), ("repair", 4.0), ("repair", 2.5)]) == {
        "new head": {"count": 1, "median": 9.0, "max": 9.0}, "repair": {"count": 3, "median": 2.5, "max": 4.0},
    }  # fmt: skip
    assert recovery_s([]) == {}
