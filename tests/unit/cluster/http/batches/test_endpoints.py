"""Answers made of jobs that have ended are those that clients get who wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.http.batches.endpoints import ENDPOINTS, EndedJob
from cluster.http.core.body import parse
from cluster.http.core.errors import ApiError
from cluster.jobs.model import JobState
from tests.support.rigs.http import AnsweringService, direct_client, make_backend

BODIES = {
    "/v1/chat/completions": b'{"messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 1}',
    "/v1/completions": b'{"prompt": ["a", "b"], "max_tokens": 9, "logprobs": 1}',
    "/v1/responses": b'{"input": "hi"}',
}


def stable(answer: dict[str, Any]) -> dict[str, Any]:
    changes = ("id", "created", "created_at", "completed_at", "output")
    output = [item["content"] for item in answer.get("output", ())]
    return {name: value for name, value in answer.items() if name not in changes} | {"output": output}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_answer_is_the_one_that_others_get(path: str) -> None:
    service, endpoint = AnsweringService(reasoning=("hm",)), ENDPOINTS[path]

    async def waited() -> dict[str, Any]:
        with direct_client(service) as client:
            found: dict[str, Any] = (await client.post(path, content=BODIES[path])).json()
            return found

    backend = make_backend(service)
    asked = parse(endpoint.model, BODIES[path])
    jobs = []
    for spec in endpoint.specs(backend, asked, service):  # type: ignore[arg-type]
        record = service.finish(service.submit(spec).id)
        service.committed[record.id] = service.output
        jobs.append(EndedJob(service, record))  # type: ignore[arg-type]

    async def made() -> dict[str, Any]:
        return await endpoint.answer(backend, asked, jobs)

    assert stable(asyncio.run(made())) == stable(asyncio.run(waited()))
    service.outcome = JobState.FAILED
    failed = [EndedJob(service, service.finish(job.record.id)) for job in jobs]  # type: ignore[arg-type]

    async def broken() -> dict[str, Any]:
        return await endpoint.answer(backend, asked, failed)

    with pytest.raises(ApiError, match="the pipeline broke"):
        asyncio.run(broken())
    backend.close()


def test_errors_have_the_names_of_the_protocol() -> None:
    endpoint = ENDPOINTS["/v1/completions"]
    asked = parse(endpoint.model, BODIES["/v1/completions"])
    assert endpoint.error(ApiError(400, "x", param="y"), asked).param == "y"
    assert endpoint.error(ValueError("x"), None).status == 500
