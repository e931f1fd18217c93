"""Who is suspected, who may run beside whom, and who is given up: a guilty job, and nobody else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.jobs.blame import ALONE_AFTER, MAX_FAILURES, SUSPECT_AFTER, Blame

AT_START = (0, 0)


def test_who_waits_is_not_blamed_and_progress_clears() -> None:
    blame = Blame()
    for _ in range(100):
        assert blame.note_failure({}) == ""
    assert blame.failures("a") == 0
    for failure in range(1, 50):  # a long job, and faults that have nothing to do with it
        assert blame.note_failure({"a": (0, 100 * failure)}) == ""
        assert blame.failures("a") == 1
    blame.note_failure({"a": (0, 0)})
    assert blame.is_suspect("a")
    assert not blame.note_progress("a", (0, 4900)), "it had come so far before"
    assert blame.note_progress("a", (0, 4901))
    assert not blame.is_suspect("a")
    blame.note_failure({"a": (1, 0)})
    blame.note_failure({"a": (2, 0)})
    assert blame.failures("a") == 1, "a token is progress too"


def test_a_suspect_runs_with_no_other_then_alone_and_is_given_up_alone() -> None:
    blame = Blame()
    for _ in range(SUSPECT_AFTER):
        blame.note_failure({"a": AT_START, "b": AT_START})
    assert blame.may_run("a", ["c"])
    assert not blame.may_run("a", ["b"])
    assert blame.may_run("c", ["b"])
    for _ in range(SUSPECT_AFTER, ALONE_AFTER):
        blame.note_failure({"b": AT_START, "c": AT_START})
    assert not blame.may_run("c", ["b"])
    assert blame.order(["c", "a", "b"]) == ["b", "c", "a"]
    for _ in range(2 * MAX_FAILURES):
        assert blame.note_failure({"b": AT_START, "c": AT_START}) == "", "another one may be the reason"
    assert blame.note_failure({"b": AT_START}) == "b"
    blame.forget("b")
    assert blame.failures("b") == 0


class Scene:
    """A pipeline with room for some jobs; each needs some steps, guilty ones fail it at a step of theirs."""

    def __init__(self, needs: list[int], guilty: dict[int, int], room: int) -> None:
        self.blame = Blame()
        self.needs = {f"j{i}": steps for i, steps in enumerate(needs)}
        self.guilty = {f"j{i}": at % self.needs[f"j{i}"] for i, at in guilty.items() if i < len(needs)}
        self.room = room
        self.waiting: list[str] = []
        self.running: dict[str, int] = {}  # steps done
        self.ended: dict[str, bool] = {}  # whether it succeeded
        self.failures = 0

    def admit(self) -> None:
        for job in self.blame.order(self.waiting):
            if len(self.running) < self.room and self.blame.may_run(job, self.running):
                self.running[job] = 0
                self.waiting.remove(job)

    def end(self, job: str, good: bool) -> None:
        self.ended[job] = good
        self.running.pop(job, None)
        self.blame.forget(job)

    def step(self) -> None:
        self.admit()
        if any(self.guilty.get(job) == done for job, done in self.running.items()):
            self.failures += 1
            given_up = self.blame.note_failure({job: (0, done) for job, done in self.running.items()})
            if given_up:
                self.end(given_up, False)
            self.waiting = [*self.running, *self.waiting]
            self.running = {}
            return
        for job in list(self.running):
            self.running[job] += 1
            self.blame.note_progress(job, (0, self.running[job]))
            if self.running[job] == self.needs[job]:
                self.end(job, True)


@settings(max_examples=200, deadline=None)
@given(
    needs=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    guilty=st.dictionaries(st.integers(0, 11), st.integers(0, 11), max_size=3),
    room=st.integers(1, 5),
    arrivals=st.lists(st.integers(0, 3), max_size=40),
)
def test_the_guilty_fail_and_all_others_succeed(
    needs: list[int], guilty: dict[int, int], room: int, arrivals: list[int]
) -> None:
    scene = Scene(needs, guilty, room)
    to_come = list(scene.needs)
    for count in [*arrivals, len(to_come)]:
        scene.waiting += to_come[:count]
        del to_come[:count]
        scene.step()
    for _ in range(2000):
        if len(scene.ended) == len(needs):
            break
        scene.step()
    assert scene.ended == {job: job not in scene.guilty for job in scene.needs}
    assert scene.failures <= len(scene.guilty) * 3 * MAX_FAILURES
