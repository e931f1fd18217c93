"""A gRPC server over a job service in memory, and a stub of it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from cluster.server.grpc_server import GrpcServer
from protos.jobs import jobs_pb2_grpc as rpc
from tests.support.fakes.jobs_api import FakeJobService, channel_to, serving


@pytest.fixture
def service() -> FakeJobService:
    return FakeJobService()


@pytest.fixture
def server(service: FakeJobService) -> Iterator[tuple[GrpcServer, str]]:
    with serving(service, max_streams=4) as made:
        yield made


@pytest.fixture
def channel(server: tuple[GrpcServer, str]) -> Iterator[grpc.Channel]:
    with channel_to(server[1]) as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> rpc.JobsStub:
    return rpc.JobsStub(channel)
