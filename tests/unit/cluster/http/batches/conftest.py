"""Batches over a job service with a fake model, whose answers are always the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.access.keys import Keys
from cluster.http.batches.batches import BatchRequest, _create
from cluster.http.batches.runner import BatchRunner
from cluster.jobs.sqlite.batches import BatchRecord, BatchStatus
from cluster.jobs.tenants.service import TenantService
from cluster.jobs.tenants.tenant import Tenant
from tests.support.fakes.stage import eventually
from tests.support.rigs.http import make_backend
from tests.support.rigs.service import Bench

TEAM = Tenant("team a")


class Batches:
    """A job service with a runner; `restart` is the death of the head and the start of the next."""

    def __init__(self, folder: Path, keys: Keys | None = None, **server: Any) -> None:
        self.server, self.keys = server, keys
        self.bench = Bench(folder, seqs=4, **server)
        self.open()

    def open(self) -> None:
        self.backend = make_backend(self.bench.service, **self.server)
        self.runner = BatchRunner(self.backend, self.bench.service, self.keys)

    def close(self) -> None:
        self.runner.close()
        self.backend.close()
        self.bench.close()

    def restart(self) -> None:
        self.runner.close()
        self.backend.close()
        self.bench.restart()
        self.open()

    def create(self, lines: list[Any], endpoint: str = "/v1/chat/completions", **fields: Any) -> str:
        """Begin a batch, not the work on it; lines that are no text are shown as JSON."""
        content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        record = self.bench.service.documents.put(
            "in.jsonl", [content.encode() or b"\n"], 1 << 20, purpose="batch", tenant=TEAM
        )
        asked = BatchRequest(input_file_id=record.id, endpoint=endpoint, **fields)
        return _create(TenantService(self.bench.service, TEAM), asked).id

    def get(self, batch_id: str) -> BatchRecord:
        batch = self.bench.service.batches.get_batch(batch_id)
        assert batch is not None
        return batch

    def reaches(self, batch_id: str, status: BatchStatus) -> BatchRecord:
        eventually(lambda: self.get(batch_id).status is status)
        return self.get(batch_id)

    def results(self, document_id: str) -> list[dict[str, Any]]:
        """The lines of an output file."""
        return [*map(json.loads, self.bench.service.documents.read(document_id).decode().splitlines())]

    def jobs(self, batch_id: str) -> list[Any]:
        """All jobs of a batch, the oldest first."""
        return [*self.bench.service.jobs([], {"batch": batch_id}, 1000, "")[0]][::-1]


@pytest.fixture
def batches(tmp_path: Path) -> Iterator[Batches]:
    made = Batches(tmp_path, max_batch_jobs=2)
    yield made
    made.close()
