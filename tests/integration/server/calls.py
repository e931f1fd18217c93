"""Requests of the server's tests, and what comes back of refused ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from protos.jobs import jobs_pb2 as pb

PROMPT = pb.SubmitRequest(prompt="hello", sampling=pb.Sampling(max_tokens=4, seed=3), labels={"team": "a"})


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert len(caught.value.details().splitlines()) <= 1
    return caught.value.code(), caught.value.details()


def pieces(*data: bytes) -> Iterator[pb.DocumentPiece]:
    yield pb.DocumentPiece(header=pb.DocumentHeader(name="report"))
    for part in data:
        yield pb.DocumentPiece(data=part)


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(condition())
