"""A head over a fake runtime, for tests of its job service, and the death of the head."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from cluster.jobs.model import JobInput, JobSpec, JobState
from cluster.server.head import Head
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.oracles.integrity import check_engine


class Bench:
    """A head without a port over a fake runtime; `restart` is its death and the start of the next."""

    def __init__(self, folder: Path, seqs: int = 2, **server: object) -> None:
        """Args: `server` are keys of that section of the configuration."""
        self.folder, self.seqs, self.server = folder, seqs, server
        self.ahead = 0.0  # the clock of the service runs ahead of this machine's by so many seconds
        self.open()

    def open(self) -> None:
        self.runtime = FakeRuntime(self.folder, self.seqs, **self.server)
        self.runtime.start()
        self.head = Head(self.runtime.deployment, runtime=self.runtime, clock=self.clock)
        self.head.start()
        self.store, self.service = self.head.store, self.head.service

    def clock(self) -> float:
        return time.time() + self.ahead

    def close(self) -> None:
        self.head.close()
        self.runtime.close()

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
        eventually(lambda: self.runtime.supervisor.running is not None)
        eventually(lambda: not self.service._live and not self.runtime.kv_usage)
        check_engine(self.runtime.engine)
