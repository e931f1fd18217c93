"""Plans and results of real stage processes through a socket beside the call."""

from __future__ import annotations

import queue

import grpc
import pytest

from cluster.common.errors import EngineError
from cluster.stages.handle import GrpcStageHandle
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import token_metadata
from protos.stage.pipe import STEPS_KEY
from tests.support.rigs.stage_processes import TOKEN, Stages, long_request


@pytest.mark.parametrize("message", [b"\xff\xff", b"\x0a\x02\x08"], ids=["no message", "cut short"])
def test_a_plan_that_cannot_be_read_ends_the_request(running: Stages, message: bytes):
    engine = running.run_engine()
    ticket = long_request(engine)
    pipe = running.handles[0]._pipe
    assert pipe is not None
    pipe.send(message)
    with pytest.raises(EngineError, match=r"stage 0 shard 0.*: a plan cannot be read"):
        ticket.wait(10)


def test_a_socket_nobody_listens_at_is_refused(running: Stages):
    stub = rpc.StageStub(running.handles[0]._channel)
    metadata = [*token_metadata(TOKEN), (STEPS_KEY, str(running.folder / "absent"))]
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(iter(()), metadata=metadata, timeout=10))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "the engine's socket cannot be reached" in str(caught.value.details())
    engine = running.run_engine()  # the shard is free for another one
    assert len(long_request(engine).request.output) > 2


def test_a_second_engine_is_lost_at_once(running: Stages):
    """It hears why, and leaves no socket behind; the first goes on."""
    first = running.run_engine()
    other = GrpcStageHandle(running.handles[0].shard, f"unix:{running.socket(0)}", TOKEN)
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    other.connect(lambda results: None, lost.put)
    assert "an engine is connected already (ALREADY_EXISTS)" in lost.get(timeout=10)
    assert not running.socket(0).with_suffix(".steps").exists()
    other._channel.close()
    assert len(long_request(first).request.output) > 2
