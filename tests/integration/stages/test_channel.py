"""The launch token on a Unix socket: every kind of method, right and wrong tokens, messages up to their limit."""

import tempfile
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from protos.jobs.limits import MAX_REQUEST_BYTES
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS, TokenInterceptor, open_channel, token_metadata

TOKEN = "f" * 64
CALLS = {  # one method of each kind
    "Probe": pb.ProbeRequest(),
    "Load": pb.LoadRequest(),
    "Activations": [pb.Frame(data=b"1"), pb.Frame(data=b"2")],
    "Run": [pb.StepPlans(plans=[pb.StepPlan(step=step)]) for step in (1, 2)],
}


class Echo(rpc.StageServicer):
    """Answers every kind of method and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.frame_bytes = 0

    def Probe(self, request, context):
        self.calls += 1
        return pb.ProbeReply(state="running")

    def Load(self, request, context):
        self.calls += 1
        yield pb.LoadProgress(ready=True)

    def Activations(self, frames, context):
        self.calls += 1
        self.frame_bytes = sum(len(frame.data) for frame in frames)
        return pb.ActivationsEnd()

    def Run(self, plans, context):
        self.calls += 1
        for burst in plans:
            yield pb.StepResults(results=[pb.StepResult(step=plan.step) for plan in burst.plans])


@pytest.fixture
def server() -> Iterator[tuple[Echo, grpc.Channel]]:
    echo = Echo()
    with tempfile.TemporaryDirectory(prefix="lr") as folder:
        address = f"unix:{Path(folder) / 's.sock'}"
        made = grpc.server(
            futures.ThreadPoolExecutor(4), interceptors=[TokenInterceptor(TOKEN)], options=CHANNEL_OPTIONS
        )
        rpc.add_StageServicer_to_server(echo, made)
        made.add_insecure_port(address)
        made.start()
        with open_channel(address) as channel:
            yield echo, channel
        made.stop(0).wait()


def call(channel: grpc.Channel, method: str, metadata: list[tuple[str, str]]) -> list[object]:
    message = CALLS[method]
    request = iter(message) if isinstance(message, list) else message
    answer = getattr(rpc.StageStub(channel), method)(request, metadata=metadata, timeout=10)
    return list(answer) if method in ("Load", "Run") else [answer]


@pytest.mark.parametrize("method", CALLS)
def test_the_token_opens_every_kind_of_method(server: tuple[Echo, grpc.Channel], method: str):
    echo, channel = server
    assert len(call(channel, method, token_metadata(TOKEN))) == (2 if method == "Run" else 1)
    assert echo.calls == 1


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("token", [None, "", TOKEN[:-1], TOKEN + "f", TOKEN.upper(), "wrong"])
def test_anything_else_is_refused_before_the_method_runs(
    server: tuple[Echo, grpc.Channel], method: str, token: str | None
):
    echo, channel = server
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, [] if token is None else token_metadata(token))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "this stage belongs to another launch (wrong token)"
    assert echo.calls == 0


def test_a_token_under_another_name_is_refused(server: tuple[Echo, grpc.Channel]):
    with pytest.raises(grpc.RpcError) as caught:
        call(server[1], "Probe", [("authorization", TOKEN)])
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(("size", "ok"), [(MAX_REQUEST_BYTES - 1024, True), (MAX_REQUEST_BYTES + 1, False)])
def test_messages_have_a_limit(server: tuple[Echo, grpc.Channel], size: int, ok: bool):
    echo, channel = server
    frames = iter([pb.Frame(data=bytes(size))])
    stub = rpc.StageStub(channel)
    if ok:
        stub.Activations(frames, metadata=token_metadata(TOKEN), timeout=30)
        assert echo.frame_bytes == size
    else:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Activations(frames, metadata=token_metadata(TOKEN), timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
