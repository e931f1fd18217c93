"""Requests that are refused before they are parsed, and those that are not."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.server.wire import MAX_FIELDS, MAX_SMALL_BYTES, check_raw
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs.limits import MAX_CHARS, MAX_LABELS, MAX_MESSAGES, MAX_QUESTIONS, MAX_STOPS

JOBS = "/longreach.jobs.v1.Jobs"
MANY = 1 << 20
LARGEST = pb.SubmitRequest(
    document=pb.DocumentQuestions(text="x" * MANY, questions=["?"] * MAX_QUESTIONS),
    sampling=pb.Sampling(stop=["s"] * MAX_STOPS, stop_token_ids=range(MAX_STOPS), max_tokens=5, temperature=0.5),
    labels={"k" * MAX_CHARS + str(number): "v" for number in range(MAX_LABELS)}, idempotency_key="k", deadline_s=5.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "request_",
    [
        pb.SubmitRequest(), LARGEST, pb.SubmitRequest(token_ids=pb.TokenIds(ids=range(MANY))),
        pb.SubmitRequest(chat=pb.Chat(messages=[pb.Message(role="user", content="c")] * MAX_MESSAGES)),
    ],
)  # fmt: skip
def test_what_keeps_the_limits_passes(request_: pb.SubmitRequest) -> None:
    check_raw(f"{JOBS}/Submit", request_.SerializeToString())


@pytest.mark.parametrize(
    "data",
    [
        pb.SubmitRequest(chat=pb.Chat(messages=[pb.Message()] * MANY)).SerializeToString(),
        pb.SubmitRequest(document=pb.DocumentQuestions(questions=[""] * MANY)).SerializeToString(),
        pb.SubmitRequest(sampling=pb.Sampling(stop=[""] * MANY)).SerializeToString(),
        b"\x52\x00" * MANY,  # labels
        b"\x30\x01" * MANY,  # priority, again and again
        b"\x12" + b"\x80\x80\x80\x01" + b"\x08\x01" * MANY,  # token ids, one by one
    ],
)
def test_too_many_fields_are_refused_at_once(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=f"at most {MAX_FIELDS} fields"):
        check_raw(f"{JOBS}/Submit", data)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("path", [f"{JOBS}/List", f"{JOBS}/Get", "/grpc.health.v1.Health/Check"])
def test_small_requests_are_small(path: str) -> None:
    check_raw(path, bytes(MAX_SMALL_BYTES))
    with pytest.raises(InvalidRequest, match=f"{MAX_SMALL_BYTES + 1} bytes: must be at most {MAX_SMALL_BYTES}"):
        check_raw(path, bytes(MAX_SMALL_BYTES + 1))
    for name in ("UploadDocument", "AppendDocument", "ImportDocument", "CountTokens"):
        check_raw(f"{JOBS}/{name}", bytes(MAX_SMALL_BYTES + 1))


@given(st.binary(max_size=200))
def test_noise_is_for_the_parser(data: bytes) -> None:
    check_raw(f"{JOBS}/Submit", data)


def test_damaged_requests_are_for_the_parser() -> None:
    noise = random.Random(3)
    whole = pb.SubmitRequest(prompt="p", labels={"a": "b"}, sampling=pb.Sampling(stop=["x"])).SerializeToString()
    for _ in range(500):
        data = bytearray(whole)
        data[noise.randrange(len(data))] = noise.randrange(256)
        check_raw(f"{JOBS}/Submit", bytes(data[: noise.randrange(len(data) + 1)]))
