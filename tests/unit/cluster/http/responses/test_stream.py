"""The events of responses and their numbers."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.outputs import PrefillProgress
from cluster.http.core.errors import ApiError
from cluster.http.core.following import Followed
from cluster.http.responses import stream
from cluster.http.responses.request import ResponsesRequest, response_spec
from cluster.http.responses.stream import ResponseStream
from cluster.jobs.model import JobState
from cluster.jobs.subscriptions import ProgressUpdate
from tests.support.rigs.http import AnsweringService, make_backend


@pytest.fixture(autouse=True)
def _all_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PROGRESS_S", 0.0)
    monkeypatch.setattr(stream, "_PROGRESS_RATE", 1 << 40)


def events_of(service: AnsweringService, after: int = -1, **fields: Any) -> list[dict[str, Any]]:
    """What a stream of a new response says."""

    async def run() -> bytes:
        backend = make_backend(service)
        request = ResponsesRequest.model_validate({"input": "hi", **fields})
        job = Followed(backend, service.submit(response_spec(backend.service, backend, request)), ends_job=False)
        pieces = [piece async for piece in ResponseStream(backend, job, after).stream()]
        backend.close()
        return b"".join(pieces)

    found = []
    for text in asyncio.run(run()).decode().split("\n\n")[:-1]:
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def numbered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events without those about progress."""
    return [e for e in events if not (e["type"] == "response.in_progress" and e["response"]["longreach"]["total"])]


def same(event: dict[str, Any]) -> str:
    """An event without what differs between two jobs."""
    text = json.dumps(event)
    number = event["response"]["id"] if "response" in event else event.get("item_id") or event["item"]["id"]
    return text.replace(number.split("_")[1], "ID")


def test_the_order_in_the_foreground() -> None:
    events = numbered(events_of(AnsweringService(("a", "b"), ("hm",))))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert all("response" in event for event in events[:2])
    assert all({"item_id", "output_index"} <= set(e) for e in events if e["type"].endswith(("delta", "text.done")))
    response = events[-1]["response"]
    assert (response["status"], response["usage"]["output_tokens"]) == ("completed", 3)
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["status"] == "in_progress"


def test_the_order_in_the_background() -> None:
    events = numbered(events_of(AnsweringService(("a",)), background=True))
    assert [event["type"].removeprefix("response.") for event in events[:4]] == [
        "created", "queued", "in_progress", "output_item.added",
    ]  # fmt: skip
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]


@pytest.mark.parametrize(("state", "reason", "name"), [
    (JobState.SUCCEEDED, "length", "incomplete"), (JobState.FAILED, "", "failed"), (JobState.CANCELLED, "", "failed"),
])  # fmt: skip
def test_other_ends(state: JobState, reason: str, name: str) -> None:
    service = AnsweringService(("a",))
    service.outcome, service.finish_reason = state, reason
    last = events_of(service)[-1]
    assert last["type"] == f"response.{name}"
    assert last["response"]["status"] == ("cancelled" if state is JobState.CANCELLED else name)
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_job_that_ends_before_it_began_counts_the_same() -> None:
    service = AnsweringService(())
    service.outcome = JobState.CANCELLED
    service._events = lambda job_id, after: iter([service.finish(job_id)])  # type: ignore[method-assign]
    events = events_of(service, background=True)
    assert [e["type"].removeprefix("response.") for e in events] == ["created", "queued", "in_progress", "failed"]


def test_progress_has_the_number_of_the_event_before_it() -> None:
    service = AnsweringService(("a", "b"))
    told = ProgressUpdate(0, PrefillProgress(100, 10, 60, 2000))
    service.events = [told, None, service.events[0], told, service.events[1]]
    events = events_of(service)
    progress = [e for e in events if e["type"] == "response.in_progress" and e["response"]["longreach"]["total"]]
    assert [e["sequence_number"] for e in progress] == [1, 1, 4]
    assert progress[1]["response"]["longreach"] == {
        "total": 100, "cached": 10, "processed": 60, "eta_ms": 2000, "recall": None,
    }  # fmt: skip
    assert progress[2]["response"]["output"][0]["content"][0]["text"] == "a"
    assert [e["sequence_number"] for e in numbered(events)] == list(range(len(numbered(events))))
    again = events_of(service, after=4)
    assert {e["sequence_number"] for e in again if e not in numbered(again)} == {4}


def test_progress_is_not_told_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PROGRESS_S", 60.0)
    service = AnsweringService(("a",))
    service.events = [ProgressUpdate(0, PrefillProgress(100, 10, n, 2000)) for n in range(20)] + service.events
    events = events_of(service)
    assert len(events) - len(numbered(events)) == 1


def test_progress_with_long_instructions_is_told_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            nonlocal now
            now += 1.0
            return now

    monkeypatch.setattr(stream, "time", Clock)
    monkeypatch.setattr(stream, "_PROGRESS_RATE", 10_000)
    service = AnsweringService(("a",))
    service.events = [ProgressUpdate(0, PrefillProgress(100, 10, n, 2000)) for n in range(20)]
    for instructions, told in (("x", 21), ("x" * 40_000, 5), ("x" * 300_000, 3)):
        events = events_of(service, instructions=instructions)
        assert len(events) - len(numbered(events)) == told


CALLS = ("x", '<tool_call>\n{"name": "f", "argu', 'ments": {"a": 1}}\n</tool_call>', "y")
TOOLS = [{"type": "function", "name": "f"}]


@settings(max_examples=40, deadline=None)
@given(st.integers(-1, 40), st.sets(st.integers(1, 5)), st.lists(st.integers(0, 5), max_size=4), st.booleans())
def test_a_stream_goes_on_from_any_number(after: int, cuts: set[int], progress: list[int], background: bool) -> None:
    """Whatever comes together, and wherever progress is told."""
    service = AnsweringService(CALLS, ("hm", "so"))
    fields: dict[str, Any] = {"tools": TOOLS, "background": background}
    whole = numbered(events_of(service, **fields))
    edges = sorted({0, len(service.output), *cuts})
    groups: list[Any] = [service.output[a:b] for a, b in itertools.pairwise(edges)]
    for place in progress:
        groups.insert(min(place, len(groups)), ProgressUpdate(0, PrefillProgress(100, 10, place, None)))
    service.events = groups
    rest = numbered(events_of(service, after, **fields))
    assert [same(event) for event in rest] == [same(event) for event in whole[after + 1 :]]


def test_one_object() -> None:
    async def run(service: AnsweringService) -> dict[str, Any]:
        backend = make_backend(service)
        spec = response_spec(backend.service, backend, ResponsesRequest.model_validate({"input": "hi"}))
        try:
            return await ResponseStream(backend, Followed(backend, service.submit(spec))).whole()
        finally:
            backend.close()

    service = AnsweringService(("a", "b"))
    assert asyncio.run(run(service))["output"][0]["content"][0]["text"] == "ab"
    service.outcome = JobState.FAILED
    with pytest.raises(ApiError, match="the pipeline broke"):
        asyncio.run(run(service))


def test_an_error_has_a_type_and_the_number_of_the_newest_event() -> None:
    async def run() -> bytes:
        service = AnsweringService(("a",))
        backend = make_backend(service)
        spec = response_spec(backend.service, backend, ResponsesRequest.model_validate({"input": "hi"}))
        service.finish = lambda job_id: replace(service.get(job_id))  # type: ignore[method-assign]  # it has not ended
        made = ResponseStream(backend, Followed(backend, service.submit(spec)))
        with pytest.raises(ApiError) as caught:
            [piece async for piece in made.stream()]
        backend.close()
        return made.error_event(caught.value)

    event = json.loads(asyncio.run(run()).decode().split("data: ")[1])
    assert (event["type"], event["code"], event["sequence_number"]) == ("error", "stopping", 4)
