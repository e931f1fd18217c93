"""Which jobs may be the reason why pipelines fail, and in which company they may run.

A failure of the pipeline is counted against the jobs that were in its steps then, and forgotten once they have come
further than ever before. One that was in `SUSPECT_AFTER` failures without such progress is a suspect: of suspects, one
at a time runs. After `ALONE_AFTER` failures it runs first and with nothing beside it, until it has come further: who
caused nothing is cleared, and who fails the pipeline alone is known. Given up is only a job with `MAX_FAILURES`
failures that was alone in the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

SUSPECT_AFTER = 2
ALONE_AFTER = 3
MAX_FAILURES = 5

Progress = tuple[int, int]  # tokens committed, prompt tokens processed


@dataclass(slots=True)
class _Suspicion:
    failures: int = 0  # in a row, without progress in between
    furthest: Progress = (0, 0)


class Blame:
    """Counts failures of jobs by their ids; not thread-safe."""

    def __init__(self) -> None:
        self._suspicions: dict[str, _Suspicion] = {}

    def note_failure(self, jobs: Mapping[str, Progress]) -> str:
        """Count a failure against the jobs that ran in it, with how far they had come; return one to give up, or ""."""
        for job_id, progress in jobs.items():
            self.note_progress(job_id, progress)
            suspicion = self._suspicions.setdefault(job_id, _Suspicion())
            suspicion.failures += 1
            suspicion.furthest = _further(suspicion.furthest, progress)
        (alone,) = jobs if len(jobs) == 1 else ("",)
        return alone if self.failures(alone) >= MAX_FAILURES else ""

    def note_progress(self, job_id: str, progress: Progress) -> bool:
        """Clear a job that has come further than at any failure; returns whether it was a suspect until now."""
        suspicion = self._suspicions.get(job_id)
        if suspicion is None or _further(suspicion.furthest, progress) == suspicion.furthest:
            return False
        was_suspect = self.is_suspect(job_id)
        suspicion.failures, suspicion.furthest = 0, _further(suspicion.furthest, progress)
        return was_suspect

    def forget(self, job_id: str) -> None:
        """Forget a job that has ended."""
        self._suspicions.pop(job_id, None)

    def is_suspect(self, job_id: str) -> bool:
        return self.failures(job_id) >= SUSPECT_AFTER

    def order(self, job_ids: Iterable[str]) -> list[str]:
        """Return jobs in the order in which to try them: those that must run alone first, others as they are."""
        return sorted(job_ids, key=lambda job_id: -max(self.failures(job_id), ALONE_AFTER - 1))

    def may_run(self, job_id: str, running: Collection[str]) -> bool:
        """Whether a job may be handed to an engine that has the jobs `running`."""
        if any(self.failures(other) >= ALONE_AFTER for other in running):
            return False
        return not (self.is_suspect(job_id) and any(map(self.is_suspect, running)))

    def failures(self, job_id: str) -> int:
        """Return the failures in a row that are counted against a job."""
        suspicion = self._suspicions.get(job_id)
        return 0 if suspicion is None else suspicion.failures


def _further(one: Progress, other: Progress) -> Progress:
    return max(one[0], other[0]), max(one[1], other[1])
