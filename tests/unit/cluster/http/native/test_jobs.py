"""Routes of jobs: submit, list, follow after any token, cancel, delete, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from cluster.access.keys import ApiKeys
from cluster.jobs.model import InvalidJob, JobState, ServiceBusy
from tests.support.rigs.http import AnsweringService, direct_client
from tests.unit.cluster.http.native.test_shapes import read

BODY = {"document": "A text.", "questions": ["Why?"], "max_tokens": 9}
KEY = "0123456789abcdef"
NO_JOB = f"job_{'0' * 32}"


def using(
    service: AnsweringService, act: Callable[[httpx.AsyncClient], Awaitable[Any]], keys: ApiKeys | None = None
) -> Any:
    async def run() -> Any:
        with direct_client(service, keys) as client:
            return await act(client)

    return asyncio.run(run())


def test_a_job_from_its_submission_to_its_end() -> None:
    service = AnsweringService()

    async def act(client: httpx.AsyncClient) -> None:
        headers = {"x-api-key": KEY, "Idempotency-Key": "once"}
        job = (await client.post("/v1/jobs", json=BODY, headers=headers)).json()
        assert (job["state"], job["answers"][0]["question"]) == ("queued", "Why?")
        assert service.specs[0].ask.max_tokens == 9
        assert (service.specs[0].idempotency_key, service.key_names, service.specs[0].attached) == (
            "once", ["team a"], False,
        )  # fmt: skip
        client.headers["x-api-key"] = KEY
        url = f"/v1/jobs/{job['id']}"
        events = read((await client.get(f"{url}/events")).content)
        assert [event["event"] for event in events] == ["progress", *["token"] * 6, "ended"]
        ended = (await client.get(url)).json()
        assert ended == events[-1]["data"]["job"]
        assert (ended["state"], ended["answers"][0]["text"]) == ("succeeded", "The answer is forty-two.")
        assert (await client.post(f"{url}/cancel")).json()["state"] == "succeeded"  # it had ended
        assert (await client.delete(url)).json() == {"id": job["id"], "deleted": True}
        assert (await client.get(url)).status_code == 404

    using(service, act, ApiKeys({KEY: "team a"}))


def test_events_begin_after_any_token_and_end_with_the_job() -> None:
    service = AnsweringService()
    given: list[int] = []
    stream = service.stream
    service.stream = lambda job_id, after=0: (given.append(after), stream(job_id, after))[1]  # type: ignore[method-assign, func-returns-value]

    async def act(client: httpx.AsyncClient) -> None:
        url = f"/v1/jobs/{(await client.post('/v1/jobs', json=BODY)).json()['id']}/events"
        events = read((await client.get(url)).content)
        assert [event.get("id") for event in events] == [None, "1", "2", "3", "4", "5", "6", None]
        assert "".join(event["data"]["token"]["answer"] for event in events[1:-1]) == "The answer is forty-two."
        await client.get(url, params={"after": 3})
        await client.get(url, headers={"Last-Event-ID": "4"})
        await client.get(url, params={"after": 5}, headers={"Last-Event-ID": "4"})
        assert given == [0, 3, 4, 5]
        for headers, params in (({"Last-Event-ID": "x"}, {}), ({}, {"after": "-1"}), ({}, {"after": "9" * 30})):
            refused = await client.get(url, headers=headers, params=params)
            assert (refused.status_code, refused.json()["error"]["param"] is None) == (400, False)

    using(service, act)


def test_lists_have_pages_states_and_labels() -> None:
    service = AnsweringService()
    searches: list[Any] = []
    jobs = service.jobs
    service.jobs = lambda *given: (searches.append(given), jobs(*given))[1]  # type: ignore[method-assign, func-returns-value]

    async def act(client: httpx.AsyncClient) -> None:
        ids = [(await client.post("/v1/jobs", json=BODY)).json()["id"] for _ in range(3)]
        page = (await client.get("/v1/jobs", params={"page_size": 2})).json()
        assert ([job["id"] for job in page["jobs"]], page["next_page_token"]) == (ids[:2], ids[1])
        found = {"state": ["queued", "failed"], "label": ["a=b=c"], "page_token": ids[0]}
        await client.get("/v1/jobs", params=found)
        assert searches[-1] == ([JobState.QUEUED, JobState.FAILED], {"a": "b=c"}, 100, ids[0], None)
        for wrong in ({"state": "done"}, {"label": "a"}, {"page_size": "0"}, {"page_size": "x"}):
            refused = await client.get("/v1/jobs", params=wrong)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error"), wrong

    using(service, act)


@pytest.mark.parametrize(("body", "param"), [
    ({"document": "a"}, "questions"), ({"prompt": "a", "max_token": 3}, "max_token"), ([], None),
    ({"document_id": "doc_x", "questions": ["a"]}, None), ({"prompt": "a", "top_p": 7}, "top_p"),
    ({"document": "a", "questions": [" "]}, "questions"), ({"document": "a", "questions": "b"}, "questions"),
])  # fmt: skip
def test_wrong_bodies_name_the_field(body: Any, param: str | None) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        refused = await client.post("/v1/jobs", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)

    using(AnsweringService(), act)


def test_errors_of_the_service() -> None:
    service = AnsweringService()

    async def act(client: httpx.AsyncClient) -> None:
        for method, path in (
            ("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", ""),
        ):  # fmt: skip
            missing = await client.request(method, f"/v1/jobs/{NO_JOB}{path}")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
            assert (await client.request(method, f"/v1/jobs/x{path}")).status_code == 400
        service.error = ServiceBusy("queue: full", 7.0)
        busy = await client.post("/v1/jobs", json=BODY)
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "7")
        service.error = InvalidJob("document.questions: 3: wrong")
        assert (await client.post("/v1/jobs", json=BODY)).json()["error"]["param"] == "questions"

    using(service, act)
