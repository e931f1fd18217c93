"""How kills are counted: what is computed again after each, and the report over all batches."""

from __future__ import annotations

from typing import Any

from cluster.bench.history import Seen
from cluster.bench.kills import recomputed, summarize

JOB = {"client": "a", "job": "job_1", "follower": 1}


def progress(at: float, processed: int, cached: int = 0, question: int = 0, job: str = "job_1") -> Seen:
    return Seen("progress", at, "a", job, follower=1, processed=processed, total=9000, cached=cached, question=question)


def test_what_was_done_and_is_not_found_again_is_recomputed() -> None:
    history = [
        Seen("state", 1, **JOB, state="prefilling"), progress(2, 2048), progress(3, 4000),
        Seen("state", 5, **JOB, state="recovering", restarts=1),
        progress(6, 3584, 3584), progress(7, 5000, 3584),
        Seen("state", 9, **JOB, state="recovering", restarts=2), progress(10, 4608, 4608), progress(11, 4700, 4608),
    ]  # fmt: skip
    assert recomputed(history, 4, 8, {}) == {"job_1/0": (4000, 416)}
    assert recomputed(history, 8, float("inf"), {}) == {"job_1/0": (5000, 392)}


def test_jobs_that_were_not_restarted_or_not_begun_compute_nothing_again() -> None:
    history = [
        progress(2, 100, job="job_2"),
        Seen("state", 5, **JOB, state="recovering", restarts=1),
        progress(6, 0), progress(6, 200, job="job_2"),
    ]  # fmt: skip
    assert recomputed(history, 4, 8, {}) == {}


def test_progress_that_is_repeated_is_not_the_restarted_job() -> None:
    history = [
        progress(2, 1000), Seen("state", 5, **JOB, state="recovering", restarts=1),
        progress(5.5, 1000), progress(6, 1024, 900),
    ]  # fmt: skip
    assert recomputed(history, 4, 8, {}) == {"job_1/0": (1000, 100)}


def test_progress_while_stored_kv_is_loaded_says_nothing_of_what_is_found() -> None:
    restart = Seen("state", 5, **JOB, state="recovering", restarts=1)
    history = [progress(3, 8000), restart, progress(6, 0), progress(7, 7680, 7680), progress(8, 8500, 7680)]
    assert recomputed(history, 4, 9, {}) == {"job_1/0": (8000, 320)}
    waiting: dict[str, int] = {}
    assert recomputed(history[:-1], 4, 9, waiting) == {}
    assert waiting == {"job_1/0": 8000}
    history = [progress(3, 8000), restart, progress(6, 512, 512), progress(7, 2560, 512)]
    assert recomputed(history, 4, 9, {}) == {"job_1/0": (8000, 7488)}


def test_a_stream_that_began_after_the_kill_shows_progress_before_the_state() -> None:
    history = [
        progress(2, 1000),
        Seen("attached", 5, "a", "job_1", follower=2),
        Seen("progress", 6, "a", "job_1", follower=2, processed=1200, total=9000),
        Seen("state", 6.1, "a", "job_1", follower=2, state="prefilling", restarts=1),
    ]
    assert recomputed(history, 4, 8, {}) == {"job_1/0": (1000, 1000)}


def test_what_has_not_begun_again_at_the_next_kill_is_counted_for_that_one() -> None:
    history = [
        progress(3, 6000), Seen("state", 5, **JOB, state="recovering", restarts=1), progress(6, 0),
        progress(11, 0), progress(12, 5632, 5632), progress(13, 5700, 5632), progress(20, 6100, 5632),
    ]  # fmt: skip
    waiting: dict[str, int] = {}
    assert recomputed(history, 4, 10, waiting) == {}
    assert recomputed(history, 10, 15, waiting) == {"job_1/0": (6000, 368)}
    assert (waiting, recomputed(history, 15, float("inf"), waiting)) == ({}, {})


def test_the_report_is_over_all_batches() -> None:
    def kill(target: str, back: float, again: int, bound: int) -> dict[str, Any]:
        counts = {"recomputed": again, "unstored": 0, "bound": bound, "restarted": 1}
        return {"target": target, "back_s": back, "how": "repair" if target == "stage" else "full restart"} | counts

    rows = [
        {"batch": 0, "kills": [kill("stage", 1, 100, 1024), kill("gcs", 9, 0, 0)], "cold_start_s": 6,
         "problems": [], "facts": {"jobs": 3, "tokens": 50}},
        {"batch": 1, "kills": [kill("stage", 3, 2000, 1024)], "cold_start_s": 8,
         "problems": ["x"], "facts": {"jobs": 4, "tokens": 60}},
    ]  # fmt: skip
    report = summarize(rows)
    assert (report["kills"], report["jobs"], report["tokens"], report["problems"]) == (3, 7, 110, ["x"])
    assert report["recovery_s"] == {"gcs": 9, "stage": 2}
    assert report["recovered_by"] == {
        "full restart": {"count": 1, "median_s": 9, "max_s": 9}, "repair": {"count": 2, "median_s": 2, "max_s": 3},
    }  # fmt: skip
    assert report["cold_start_s"] == 7
    assert report["recomputed_largest"] == 2000
    assert [entry["recomputed"] for entry in report["beyond_bound"]] == [2000]
