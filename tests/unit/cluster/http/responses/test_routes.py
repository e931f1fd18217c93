"""The routes of responses, through the whole application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from cluster.jobs.model import JobState, NotAllowedNow, ServiceBusy
from tests.support.data.clients.codex import first_request, request_after_calls
from tests.support.rigs.http import AnsweringService, direct_client

URL = "/v1/responses"


def run(service: AnsweringService, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        with direct_client(service) as client:
            return await work(client)

    return asyncio.run(main())


def post(service: AnsweringService, path: str = URL, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return run(service, lambda client: client.post(path, json={"input": "hi", **body}, headers=headers))


def get(service: AnsweringService, path: str) -> Any:
    return run(service, lambda client: client.get(f"{URL}/{path}"))


def events(answer: Any) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: ")]


def test_one_object_that_can_be_read_again() -> None:
    service = AnsweringService(reasoning=("hm",))
    made = post(service).json()
    assert made["status"] == "completed"
    assert get(service, made["id"]).json() == made
    assert "openai-poll-after-ms" not in get(service, made["id"]).headers
    assert get(service, post(service, store=False).json()["id"]).status_code == 404


@pytest.mark.parametrize("body", [first_request(), request_after_calls()])
def test_a_turn_of_codex(body: dict[str, Any]) -> None:
    words = ('<tool_call>\n{"name": "mcp__docs__search", "arguments": {"query": "x"}}\n</tool_call>',)
    found = events(post(AnsweringService(words, ("hm",)), **body))
    assert [event["type"] for event in found][-1] == "response.completed"
    assert all("sequence_number" in event for event in found)
    (call,) = (item for item in found[-1]["response"]["output"] if item["type"] == "function_call")
    assert (call["name"], call["namespace"], call["arguments"]) == ("search", "mcp__docs", '{"query": "x"}')
    assert [e["item"] for e in found if e["type"] == "response.output_item.done"][-1] == call


def test_a_response_in_the_background() -> None:
    service = AnsweringService()
    answer = post(service, background=True, headers={"Idempotency-Key": "k"})
    made = answer.json()
    assert (made["status"], made["output"], made["background"]) == ("queued", [], True)
    assert answer.headers["openai-poll-after-ms"] == "5000"
    assert service.specs[0].idempotency_key == "k"
    assert get(service, made["id"]).json()["longreach"]["processed"] == 20
    whole = events(get(service, f"{made['id']}?stream=true"))
    progress, *rest = events(get(service, f"{made['id']}?stream=true&starting_after=6"))
    assert (progress["type"], progress["sequence_number"]) == ("response.in_progress", 6)
    assert rest == [event for event in whole if event["sequence_number"] > 6]
    ended = get(service, made["id"])
    assert (ended.json()["status"], "openai-poll-after-ms" in ended.headers) == ("completed", False)
    assert service.get(f"job_{made['id'][5:]}").state is JobState.SUCCEEDED


def test_cancelling_and_deleting() -> None:
    service = AnsweringService()
    made = post(service, background=True).json()
    for _ in range(2):
        cancelled = post(service, f"{URL}/{made['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")

    def delete() -> Any:
        return run(service, lambda client: client.delete(f"{URL}/{made['id']}"))

    def still_runs(job_id: str) -> None:
        raise NotAllowedNow(f"job {job_id}: still runs: cancel it first")

    service.delete, whole = still_runs, service.delete  # type: ignore[method-assign]
    assert delete().status_code == 409
    service.delete = whole  # type: ignore[method-assign]
    assert delete().json() == {"id": made["id"], "object": "response", "deleted": True}
    assert delete().status_code == get(service, made["id"]).status_code == 404
    assert post(service, f"{URL}/{made['id']}/cancel").status_code == 404


def test_input_items() -> None:
    service = AnsweringService()
    body = request_after_calls() | {"background": True, "store": True, "stream": False}
    made = post(service, **body).json()
    found = get(service, f"{made['id']}/input_items?limit=2").json()
    assert (found["object"], found["has_more"], len(found["data"])) == ("list", True, 2)
    assert found["data"][0]["output"] == "nothing found"
    rest = get(service, f"{made['id']}/input_items?order=asc&after={found['last_id']}").json()
    assert [item["id"] for item in rest["data"]] == [found["first_id"]]


@pytest.mark.parametrize(("query", "param"), [
    ("?starting_after=x", "starting_after"), ("?starting_after=-2", "starting_after"), ("?stream=5", "stream"),
    ("?starting_after=" + "9" * 30, "starting_after"), ("?starting_after=%C2%B2", "starting_after"),
    ("/input_items?limit=0", "limit"), ("/input_items?limit=101", "limit"), ("/input_items?order=x", "order"),
    ("/input_items?after=x", "after"),
])  # fmt: skip
def test_queries_that_are_wrong(query: str, param: str) -> None:
    service = AnsweringService()
    made = post(service).json()
    refused = get(service, made["id"] + query)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_refused_before_a_stream_begins(stream: bool) -> None:
    service = AnsweringService()
    service.error = ServiceBusy("full", 2.5)
    for background in (False, True):
        refused = post(service, stream=stream, background=background)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    refused = post(service, stream=stream, input=[])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")


def test_a_job_that_fails() -> None:
    service = AnsweringService()
    service.outcome = JobState.FAILED
    assert post(service).json()["error"]["message"] == "the pipeline broke"
    assert events(post(service, stream=True))[-1]["type"] == "response.failed"
