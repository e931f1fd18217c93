"""The object of a response in every state of its job."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cluster.engine.outputs import PrefillProgress
from cluster.http.core.errors import ApiError
from cluster.http.responses.names import response_id
from cluster.http.responses.request import ResponsesRequest, response_spec
from cluster.http.responses.response import poll_after_ms, read_response, said_of, status_of, stored_response
from cluster.jobs.model import JobInput, JobRecord, JobSpec, JobState
from protos.jobs.sampling import AnswerOptions
from tests.support.rigs.http import AnsweringService, make_backend


def submitted(service: AnsweringService, **fields: Any) -> JobRecord:
    request = ResponsesRequest.model_validate({"input": "hi", "background": True, **fields})
    backend = make_backend(service)
    record = service.submit(response_spec(backend.service, backend, request))
    backend.close()
    return record


def read(service: AnsweringService, record: JobRecord) -> dict[str, Any]:
    backend = make_backend(service)
    shown = read_response(service, backend, record)
    backend.close()
    json.dumps(shown, allow_nan=False)
    return shown


def test_a_queued_one() -> None:
    service = AnsweringService()
    shown = read(service, submitted(service, metadata={"a": "b"}))
    assert (shown["object"], shown["status"], shown["output"], shown["usage"]) == ("response", "queued", [], None)
    assert shown["id"].startswith("resp_")
    assert (shown["error"], shown["incomplete_details"], shown["completed_at"]) == (None, None, None)
    assert (shown["background"], shown["metadata"]) == (True, {"a": "b"})
    assert shown["longreach"] == {"total": 100, "cached": 10, "processed": 20, "eta_ms": 5000, "recall": None}


def test_a_completed_one() -> None:
    service = AnsweringService(reasoning=("hm",))
    record = submitted(service)
    shown = read(service, service.finish(record.id))
    assert shown["status"] == "completed"
    assert [item["type"] for item in shown["output"]] == ["reasoning", "message"]
    assert shown["output"][1]["content"][0]["text"] == "The answer is forty-two."
    assert {item["status"] for item in shown["output"]} == {"completed"}
    assert shown["usage"] == {
        "input_tokens": 17, "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0}, "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 24,
    }  # fmt: skip
    assert shown["longreach"] == {"total": 17, "cached": 5, "processed": 17, "eta_ms": 0, "recall": None}
    assert shown["completed_at"] == 3


def test_the_recall_of_sparse_attention() -> None:
    service = AnsweringService()
    record = service.finish(submitted(service).id)
    answer = replace(record.answers[0], attention={"cells": 3, "held_out_recall": 0.97})
    assert read(service, replace(record, answers=(answer,)))["longreach"]["recall"] == 0.97


@pytest.mark.parametrize(("state", "reason", "status"), [
    (JobState.SUCCEEDED, "length", "incomplete"), (JobState.FAILED, "", "failed"),
    (JobState.CANCELLED, "", "cancelled"),
])  # fmt: skip
def test_one_without_a_whole_answer(state: JobState, reason: str, status: str) -> None:
    service = AnsweringService()
    service.outcome, service.finish_reason = state, reason
    shown = read(service, service.finish(submitted(service).id))
    assert shown["status"] == status
    assert shown["output"][0]["status"] == "incomplete"
    assert shown["incomplete_details"] == ({"reason": "max_output_tokens"} if status == "incomplete" else None)
    assert (shown["error"] or {}).get("message") == {
        "failed": "the pipeline broke", "cancelled": "the response was cancelled",
    }.get(status)  # fmt: skip
    assert shown["usage"]["output_tokens"] == 6


def test_one_that_failed_before_its_prompt_was_read() -> None:
    service = AnsweringService()
    record = replace(submitted(service), state=JobState.FAILED, error="no")
    shown = read(service, record)
    assert (shown["output"], shown["usage"]["total_tokens"]) == ([], 0)
    assert shown["longreach"]["total"] is None


def test_the_status_while_a_job_runs() -> None:
    record = submitted(AnsweringService())
    states = {state: status_of(replace(record, state=state)) for state in JobState if not state.is_final}
    assert states == {
        "queued": "queued", "prefilling": "in_progress", "decoding": "in_progress", "recovering": "queued",
    }  # fmt: skip
    assert status_of(replace(record, state=JobState.RECOVERING, started=2.0)) == "in_progress"


@pytest.mark.parametrize(("state", "eta_ms", "wait_ms"), [
    (JobState.QUEUED, None, 2000), (JobState.PREFILLING, 100, 500), (JobState.PREFILLING, 7000, 7000),
    (JobState.PREFILLING, 10**7, 30_000), (JobState.DECODING, 0, 1000), (JobState.SUCCEEDED, None, None),
])  # fmt: skip
def test_when_to_ask_again(state: JobState, eta_ms: int | None, wait_ms: int | None) -> None:
    record = replace(submitted(AnsweringService()), state=state)
    assert poll_after_ms(record, PrefillProgress(10, 0, 5, eta_ms)) == wait_ms


def test_only_stored_responses_are_found() -> None:
    service = AnsweringService()
    backend = make_backend(service)
    record = submitted(service)
    assert stored_response(service, response_id(record.id)) == record
    unstored = submitted(service, background=False, store=False)
    chat = service.submit(JobSpec(JobInput(prompt="a"), AnswerOptions()))
    assert said_of(chat) == {}
    for value in (response_id(unstored.id), response_id(chat.id), f"resp_{'0' * 32}", record.id, "../x"):
        with pytest.raises(ApiError) as caught:
            stored_response(service, value)
        assert (caught.value.status, caught.value.code) == (404, "not_found")
    backend.close()
