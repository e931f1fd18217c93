"""Bodies of jobs become the requests of the client library, with its checks."""

from __future__ import annotations

import pytest

from cluster.client.requests import SubmitOptions, build_submit
from cluster.http.core.errors import ApiError
from cluster.http.native.job_request import _INPUT, JobRequest, submit_request
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb

DOC = f"doc_{'0' * 32}"


def test_fields_are_those_of_the_library() -> None:
    assert set(JobRequest.model_fields) - set(_INPUT) == set(SubmitOptions.__annotations__)


def test_a_body_is_the_call_of_the_library() -> None:
    asked = JobRequest(document="A text.", questions=["Why?", "Who?"], max_tokens=7, stop="end", labels={"a": "b"})
    theirs = build_submit("A text.", ["Why?", "Who?"], {"max_tokens": 7, "stop": "end", "labels": {"a": "b"}})
    ours = submit_request(asked, None)
    assert ours.idempotency_key != theirs.idempotency_key
    theirs.idempotency_key = ours.idempotency_key
    assert ours == theirs


def test_the_key_of_the_body_goes_first() -> None:
    assert submit_request(JobRequest(prompt="a"), "k1").idempotency_key == "k1"
    assert submit_request(JobRequest(prompt="a", idempotency_key="k2"), "k1").idempotency_key == "k2"


def test_reading_a_document() -> None:
    asked = submit_request(JobRequest(document_id=DOC, read=True, priority=3), None)
    assert asked.document == pb.DocumentQuestions(document_id=DOC, read=True)
    assert asked.priority == 3


@pytest.mark.parametrize(("body", "message"), [
    ({"document": "a", "document_id": DOC, "questions": ["b"]}, "document_id: must not"),
    ({"document_id": DOC, "questions": ["b"], "read": True}, "read: true"), ({"read": True}, "read: true"),
    ({"document_id": DOC}, "question: goes with"), ({}, "input: must be exactly one"),
    ({"prompt": "a", "token_ids": [1]}, "input: must be"), ({"prompt": "a", "max_tokens": 0}, "max_tokens: 0"),
    ({"prompt": "a", "deadline_s": -1}, "deadline_s: -1"), ({"messages": [{"role": "?"}]}, "messages"),
])  # fmt: skip
def test_wrong_bodies(body: dict[str, object], message: str) -> None:
    with pytest.raises((ApiError, InvalidRequest), match=message):
        submit_request(JobRequest.model_validate(body), None)
