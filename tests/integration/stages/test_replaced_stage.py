"""A stage that was replaced and lives on: what it still sends, and what is still sent to it, changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable

import grpc
import pytest
import torch

from cluster.common.errors import EngineError, StageError
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import call_metadata
from protos.stage.messages import StepPlan
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import submit
from tests.support.rigs.stage_processes import TOKEN, Stages, eventually, long_request
from workers.transport.frames import split
from workers.transport.link import UnixSender

SPEC = generation_spec([(7 * i) % 4000 + 5 for i in range(300)], 40, ignore_eos=True)
TOKEN_FRAME = pb.Frame(data=next(split(torch.zeros(1, dtype=torch.int64), 1)))
PLANS = codec.plans_to_pb([StepPlan(1000, ()), StepPlan(1001, ())])


@pytest.mark.parametrize(("stage", "same_node"), [(0, False), (1, True)])
def test_a_stopped_stage_is_replaced_and_goes_on(stages: Stages, stage: int, same_node: bool) -> None:
    stages.spawn()
    stages.load()
    stages.start(same_node=same_node)
    engine = stages.run_engine()
    expected = submit(engine, SPEC).wait(60).token_ids
    before = stages.handles[1 - stage].probe()
    handle = long_request(engine)
    old = stages.processes[stage]
    old.send_signal(signal.SIGSTOP)
    engine.fail("hung", [stage])
    with pytest.raises(EngineError, match="hung"):
        handle.wait(10)
    engine.stop()

    stages.replace(stage, 1, same_node=same_node)
    engine = stages.run_engine()
    again = submit(engine, SPEC)
    old.send_signal(signal.SIGCONT)  # it goes on where it was, with frames for its neighbour and results
    assert again.wait(60).token_ids == expected
    assert submit(engine, SPEC).wait(60).token_ids == expected
    after = stages.handles[1 - stage].probe()
    assert (after.state, after.error, after.epoch) == ("running", "", 1)
    assert after.layers_done > before.layers_done, "it is the same process"


def test_late_messages_are_refused_and_counted(running: Stages) -> None:
    engine = running.run_engine()
    expected = submit(engine, SPEC).wait(60).token_ids
    engine.stop()
    running.replace(1, 1)
    visitor = UnixSender(str(running.folder / "link1r0e1.sock"), epoch=0)  # it is there before the new stage 1
    visitor.send(1, torch.zeros(1, dtype=torch.int64))
    engine = running.run_engine()
    handle = long_request(engine)
    shard = running.handles[0]
    late = shard.probe().late
    assert late == 1, "the visitor"
    stub, metadata = rpc.StageStub(shard._channel), call_metadata(TOKEN, 0)
    calls: list[Callable[[], object]] = [
        lambda: list(stub.Run(iter([PLANS]), metadata=metadata, timeout=10)),
        lambda: stub.Activations(iter([TOKEN_FRAME]), metadata=metadata, timeout=10),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError, match="this shard is running in epoch 1, not in 0"):
            call()
    with pytest.raises(StageError, match="this shard is running in epoch 1, not in 1"):
        shard.relink(pb.StartRequest(epoch=1), 10)
    assert shard.probe().late == late + 3
    engine.cancel(handle)
    assert submit(engine, SPEC).wait(60).token_ids == expected
    visitor.close()


def test_a_run_that_was_not_ended_is(running: Stages) -> None:
    """By the new epoch; nobody computes the plans that still come."""
    engine = running.run_engine()
    long_request(engine)
    first, second = running.handles
    run, first._run = first._run, None  # as if the shard could not be reached when its run was to end
    assert run is not None
    second.disconnect()
    running.replace(1, 1)
    steps = first.probe().steps_done
    run.plans.put(PLANS)
    assert run.thread is not None
    eventually(lambda: not run.thread.is_alive(), 10)
    assert first.probe().steps_done == steps
    engine.stop()
    assert len(submit(running.run_engine(), SPEC).wait(60).token_ids) == 40
