"""Requests of the server's tests, and what comes back of refused ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.jobs import jobs_pb2 as pb

Metadata = list[tuple[str, str]]
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


def ask_reflection(
    channel: grpc.Channel, metadata: Metadata, **request: str
) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(**request)])
    return next(stub.ServerReflectionInfo(requests, metadata=metadata, timeout=10))


def every_method(channel: grpc.Channel, metadata: Metadata) -> list[str]:
    """Paths of all methods of all services, from the server itself."""
    paths = []
    for service in ask_reflection(channel, metadata, list_services="").list_services_response.service:
        found = ask_reflection(channel, metadata, file_containing_symbol=service.name).file_descriptor_response
        for raw in found.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for described in file.service:
                if f"{file.package}.{described.name}" == service.name:
                    paths += [f"/{service.name}/{method.name}" for method in described.method]
    return paths
