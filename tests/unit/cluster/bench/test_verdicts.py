"""The judge of histories: a right one passes, and each kind of wrong one is found by the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.history import History, Seen
from cluster.bench.verdicts import RULES, Expected, judge

JOB, DONE, STOPPED = "job_1", "job_2", "job_3"
EXPECTED = Expected({"short": ((7, 8, 9),), "two": ((1, 2), (3,))}, most_restarts=1)


def right() -> list[Seen]:
    """Three jobs: one that recovers while two clients follow it, one of two questions, one that is cancelled."""
    a, b = {"client": "a", "job": JOB}, {"client": "b", "job": JOB}
    return [
        Seen("submitted", 1, **a, key="k1", kind="short"),
        Seen("submitted", 1.1, **b, key="k1", kind="short"),
        Seen("attached", 2, **a, follower=1),
        Seen("state", 2, **a, follower=1, state="prefilling"),
        Seen("progress", 3, **a, follower=1, processed=10, total=20, cached=0),
        Seen("progress", 3.5, **a, follower=1, processed=20, total=20, cached=0),
        Seen("token", 4, **a, follower=1, number=1, token=7, text="x"),
        Seen("state", 4.5, **b, began=4.4, state="decoding", number=1),
        Seen("state", 5, **a, follower=1, state="recovering", restarts=1),
        Seen("progress", 5.5, **a, follower=1, processed=15, total=20, cached=15),
        Seen("attached", 6, **b, follower=2, number=1),
        Seen("token", 7, **a, follower=1, number=2, token=8, text="y"),
        Seen("token", 7, **b, follower=2, number=2, token=8, text="y"),
        Seen("token", 8, **a, follower=1, number=3, token=9, text="z"),
        Seen("token", 8, **b, follower=2, number=3, token=9, text="z"),
        Seen("state", 9, **a, follower=1, state="succeeded", restarts=1),
        Seen("detached", 9, **a, follower=1),
        Seen("detached", 9, **b, follower=2),
        Seen("state", 10, **b, began=9.5, state="succeeded", number=3, restarts=1),
        Seen("answer", 10, **b, began=9.5, tokens=(7, 8, 9), text="xyz", state="succeeded"),
        Seen("error", 11, "a", JOB, kind="Get", state="UNAVAILABLE", text="connection refused"),
        Seen("submitted", 11, "a", DONE, key="k2", kind="two"),
        Seen("state", 12, "a", DONE, began=11.5, state="succeeded", number=3),
        Seen("answer", 12, "a", DONE, tokens=(1, 2), text="p", state="succeeded"),
        Seen("answer", 12, "a", DONE, question=1, tokens=(3,), text="q", state="succeeded"),
        Seen("submitted", 13, "b", STOPPED, key="k3", kind="short"),
        Seen("cancelled", 14, "b", STOPPED, state="cancelled", number=1),
        Seen("state", 15, "b", STOPPED, began=14.5, state="cancelled", number=1),
        Seen("answer", 15, "b", STOPPED, tokens=(7,), text="x", state="cancelled"),
    ]


def change(where: Callable[[Seen], bool], **values: object) -> Callable[[list[Seen]], list[Seen]]:
    """Change the first observation that fits."""

    def apply(seen: list[Seen]) -> list[Seen]:
        at = next(n for n, one in enumerate(seen) if where(one))
        return [*seen[:at], replace(seen[at], **values), *seen[at + 1 :]]  # type: ignore[arg-type]

    return apply


def drop(where: Callable[[Seen], bool]) -> Callable[[list[Seen]], list[Seen]]:
    return lambda seen: [one for one in seen if not where(one)]


def twice(where: Callable[[Seen], bool]) -> Callable[[list[Seen]], list[Seen]]:
    return lambda seen: [copy for one in seen for copy in ([one, one] if where(one) else [one])]


def add(*more: Seen) -> Callable[[list[Seen]], list[Seen]]:
    return lambda seen: [*seen, *more]


def token(number: int, follower: int = 1) -> Callable[[Seen], bool]:
    return lambda one: one.what == "token" and one.number == number and one.follower == follower


def answer(job: str) -> Callable[[Seen], bool]:
    return lambda one: one.what == "answer" and one.job == job


def ended(job: str) -> Callable[[Seen], bool]:
    return lambda one: one.job == job and one.what in ("state", "cancelled") and one.state in ("succeeded", "cancelled")


WRONG = {
    "a job that never ends": ("accepted_jobs_end_once", drop(ended(DONE))),
    "a job that ends twice": ("accepted_jobs_end_once", add(Seen("state", 20, "a", JOB, began=19, state="failed"))),
    "a job that runs after its end": (
        "accepted_jobs_end_once", add(Seen("state", 20, "a", JOB, began=19, state="decoding")),
    ),
    "a lost token": ("numbers_are_consecutive", drop(token(2))),
    "a lost first token": ("numbers_are_consecutive", drop(token(1))),
    "a repeated token": ("numbers_are_consecutive", twice(token(2))),
    "a token before the attach point": ("numbers_are_consecutive", change(token(2, 2), number=1)),
    "a token that one follower sees otherwise": ("followers_agree", change(token(3, 2), token=5)),
    "a text that one follower sees otherwise": ("followers_agree", change(token(3, 2), text="w")),
    "a token of another question": ("followers_agree", change(token(3, 2), question=1)),
    "a stream that ends before the last token": ("streams_agree_with_get", drop(lambda s: token(3)(s))),
    "a late stream that ends before the last token": ("streams_agree_with_get", drop(lambda s: token(3, 2)(s))),
    "a stream with other tokens than Get": ("streams_agree_with_get", change(answer(JOB), tokens=(7, 8, 1))),
    "a text that is not that of the tokens": ("streams_agree_with_get", change(answer(JOB), text="xyw")),
    "an answer that changes": ("answers_do_not_change", add(Seen(
        "answer", 20, "a", JOB, began=19, tokens=(7, 8), text="xy", state="succeeded",
    ))),
    "an altered token": ("tokens_are_as_undisturbed", change(answer(DONE), tokens=(1, 5))),
    "a missing last token": ("tokens_are_as_undisturbed", change(answer(DONE), tokens=(1,))),
    "a token too many": ("tokens_are_as_undisturbed", change(answer(DONE), tokens=(1, 2, 2))),
    "an altered token of a cancelled job": ("tokens_are_as_undisturbed", change(answer(STOPPED), tokens=(6,))),
    "progress that falls without recovering": (
        "progress_goes_forward",
        lambda seen: drop(lambda s: s.restarts > 0)(seen),
    ),
    "progress beyond the total": ("progress_goes_forward", change(lambda s: s.processed == 20, processed=21)),
    "a prompt that changes its length": ("progress_goes_forward", change(lambda s: s.processed == 20, total=30)),
    "a key that gives two jobs": ("equal_keys_are_one_job", change(lambda s: s.key == "k2", key="k1")),
    "a job for two keys": ("equal_keys_are_one_job", change(lambda s: s.client == "b" and s.key == "k1", key="k9")),
    "a token after a cancel": ("cancelled_jobs_stop", add(
        Seen("attached", 14.1, "a", STOPPED, follower=3, number=1),
        Seen("token", 14.2, "a", STOPPED, follower=3, number=2, token=8, text="y"),
    )),
    "more tokens in Get after a cancel": (
        "cancelled_jobs_stop", change(lambda s: s.what == "state" and s.job == STOPPED, number=2),
    ),
    "a cancel that does not end the job": (
        "cancelled_jobs_stop", change(lambda s: s.what == "cancelled", state="decoding"),
    ),
    "too many restarts": ("restarts_are_shown", change(lambda s: s.what == "state" and s.number == 3, restarts=2)),
    "a restart that is not shown": ("restarts_are_shown", lambda seen: [
        *drop(lambda s: s.restarts > 0)(seen),
        Seen("state", 4.7, "b", JOB, began=4.6, state="queued"),
    ]),
    "restarts that fall": ("restarts_are_shown", add(
        Seen("state", 3, "c", JOB, began=3, state="prefilling", restarts=1),
        Seen("state", 4, "c", JOB, began=4, state="prefilling"),
    )),
    "a failure without a reason": ("failures_have_a_reason", add(Seen("state", 20, "a", "job_4", state="failed"))),
    "an internal error": ("errors_are_documented", change(lambda s: s.what == "error", state="INTERNAL")),
    "an error of another fault": ("errors_are_documented", change(lambda s: s.what == "error", state="NOT_FOUND")),
    "an error without words": ("errors_are_documented", change(lambda s: s.what == "error", text="")),
    "an error of two lines": ("errors_are_documented", change(lambda s: s.what == "error", text="a\nb")),
}  # fmt: skip


def test_a_right_history_passes() -> None:
    assert judge(History(right()), EXPECTED) == []


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_history_is_found(what: str) -> None:
    rule, spoil = WRONG[what]
    broken = {violation.rule for violation in judge(History(spoil(right())), EXPECTED)}
    assert rule in broken, broken


def test_every_rule_has_a_wrong_history() -> None:
    assert {rule for rule, _ in WRONG.values()} == {rule.__name__ for rule in RULES}


def test_a_failure_that_the_fault_gives_is_allowed() -> None:
    seen = [Seen("submitted", 1, "a", JOB), Seen("state", 2, "a", JOB, began=1.5, state="failed", text="too long: 9")]
    assert judge(History(seen), Expected(failures=("too long",))) == []


def test_violations_name_rule_and_job() -> None:
    seen = [Seen("submitted", 1, "a", JOB)]
    assert str(judge(History(seen), Expected())[0]) == "accepted_jobs_end_once: job_1: did not end: never seen again"


def test_a_history_is_saved_and_read_again(tmp_path: Path) -> None:
    History(right()).save(tmp_path / "h.jsonl")
    assert list(History.load(tmp_path / "h.jsonl")) == right()
