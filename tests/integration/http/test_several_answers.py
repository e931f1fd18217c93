"""Several answers to one prompt, through the job service and an engine over a fake stage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.access.call_pool import CallPool
from cluster.config.schema import ServerSection
from cluster.http.app import make_app
from cluster.http.core.backend import Backend
from cluster.jobs.model import JobState
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

BODY = {"messages": [{"role": "user", "content": "some words " * 60}], "n": 4, "max_tokens": 8}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, seqs=4)
    yield made
    made.close()


@pytest.fixture
def backend(bench: Bench) -> Iterator[Backend]:
    limits = ServerSection()
    made = Backend(bench.service, bench.runtime, limits, CallPool(limits.max_streams, "server.max_streams"))
    yield made
    made.close()


async def post(backend: Backend, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(make_app(backend, None), client=("127.0.0.1", 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        return await client.post("/v1/chat/completions", json=BODY | body, timeout=60)


def test_the_prompt_is_computed_once(bench: Bench, backend: Backend) -> None:
    answer = asyncio.run(post(backend, seed=3)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 32
    records, _ = bench.service.jobs([], {}, 10, "")
    assert {record.reproducibility["sampling"]["seed"] for record in records} == {3, 4, 5, 6}
    prompts = {record.answers[0].prompt_tokens for record in records}
    assert prompts == {usage["prompt_tokens"]}
    computed = sum(record.answers[0].prompt_tokens - record.answers[0].cached_tokens for record in records)
    assert computed <= usage["prompt_tokens"] + 3 * 16, "of the others, the last page alone"


def test_who_leaves_cancels_all(bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.runtime.shard.hold()

    async def run() -> None:
        task = asyncio.create_task(post(backend, stream=True))
        while sum(bench.service.counts()) < 4:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    eventually(lambda: {job.state for job in bench.service.jobs([], {}, 10, "")[0]} == {JobState.CANCELLED})
