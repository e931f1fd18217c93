"""A job service over a fake runtime, and the death of its head."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from cluster.engine.outputs import AnswerOptions
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import (
    JobInput,
    JobSpec,
    JobState,
    ServiceLimits,
)
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually


class Bench:
    """A service over a fake runtime and a folder; `restart` is the death of a head and the start of the next."""

    def __init__(self, folder: Path, seqs: int = 2, limits: ServiceLimits | None = None) -> None:
        self.folder, self.seqs, self.limits = folder, seqs, limits or ServiceLimits()
        self.ahead = 0.0  # the clock of the service runs ahead of this machine's by so many seconds
        self.open()

    def open(self) -> None:
        self.runtime = FakeRuntime(self.folder, self.seqs)
        self.runtime.start()
        self.store = JobStore(self.folder / "jobs.sqlite")
        self.documents = DocumentStore(self.folder / "documents", self.store, 100.0, self.clock)
        self.service = JobService(self.runtime, self.store, self.documents, self.limits, self.clock)
        self.service.start()

    def clock(self) -> float:
        return time.time() + self.ahead

    def close(self) -> None:
        self.service.close()
        self.runtime.close()
        self.store.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def submit(self, tokens: int = 5, max_tokens: int = 3, first: int = 7, **spec: object) -> str:
        given = JobInput(token_ids=(first,) * tokens)
        return self.service.submit(replace(JobSpec(given, AnswerOptions(max_tokens=max_tokens)), **spec)).id  # type: ignore[arg-type]

    def state(self, job_id: str) -> JobState:
        return self.service.get(job_id).state

    def reaches(self, job_id: str, state: JobState) -> None:
        eventually(lambda: self.state(job_id) is state)

    def ids(self, job_id: str) -> list[int]:
        return [token.token_id for token in self.service.tokens(job_id)]

    def check_idle(self) -> None:
        """Every page is back, and nothing is kept for a job."""
        eventually(lambda: not self.service._live and not self.runtime.kv_usage)
        assert not self.service._handles
        assert not self.service._queued_tokens
        self.service.check_integrity()
