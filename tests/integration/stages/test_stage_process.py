"""Real stage processes over Unix sockets: two stages with one shard each, the needle checkpoint, no Ray."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from cluster.common.errors import EngineError, StageError
from cluster.constraints.thinking import closing_ids
from cluster.engine.hang_detector import HangDetector
from cluster.stages.handle import GrpcStageHandle
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.constraint import Constraint
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import open_channel, token_metadata
from protos.stage.messages import SamplingParams
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.fakes.stage import submit
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.stage_processes import (
    CHUNK,
    NEEDLE,
    PAGE,
    PAGES,
    ROOT,
    TOKEN,
    Stages,
    eventually,
    long_request,
)
from workers.stage.server import TOKEN_VARIABLE
from workers.transport.frames import Header, split

SPECS = [
    generation_spec([(7 * i) % 4000 + 5 for i in range(300)], 6, ignore_eos=True),
    generation_spec([11, 12, 13], 5, SamplingParams(temperature=1.0, top_p=0.9, seed=5), ignore_eos=True),
    generation_spec([(3 * i) % 4000 + 5 for i in range(PAGE)], 4, SamplingParams(repetition_penalty=1.3, logprobs=2)),
    generation_spec(
        [9] * 67,
        9,
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.5),
        logit_bias={7: 2.5},
        min_tokens=8,
        prompt_logprobs=2,
    ),
]


class Watch:
    """A hang detector over the stages, by default of one second."""

    def __init__(self, stages: Stages, floor_s: float = 1.0) -> None:
        assert stages.engine is not None
        self.detector = HangDetector(stages.engine, stages.handles, floor_s=floor_s)
        self.detector.start()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.detector.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_stops_is_hung(running: Stages, stage: int):
    engine = running.run_engine()
    with Watch(running):
        handle = long_request(engine)
        running.processes[stage].send_signal(signal.SIGSTOP)
        with pytest.raises(EngineError, match=f"hung: stage {stage} shard 0 does not answer: step"):
            handle.wait(30)
        running.processes[stage].send_signal(signal.SIGCONT)


def test_a_stage_that_is_slow_but_moves_is_waited_for(running: Stages):
    """A stage that sleeps 96 % of the time: now and then it has long enough to answer and to finish layers."""
    engine = running.run_engine()
    spec = generation_spec([(5 * i) % 4000 + 5 for i in range(CHUNK * 7)], 2, ignore_eos=True)
    began = time.monotonic()
    expected = submit(engine, spec).wait(60).token_ids
    undisturbed = time.monotonic() - began
    again = generation_spec([7, *spec.prompt], 2, ignore_eos=True)
    with Watch(running, floor_s=2.0):
        handle = submit(engine, again)
        began = time.monotonic()
        while not handle.done.is_set():
            for awake_s in (0.005, 0.005, 0.03):
                running.processes[0].send_signal(signal.SIGSTOP)
                time.sleep(0.3)
                running.processes[0].send_signal(signal.SIGCONT)
                time.sleep(awake_s)
            assert time.monotonic() - began < 120
        assert len(handle.wait(0).token_ids) == len(expected) == 2
    assert time.monotonic() - began > max(0.9, 3 * undisturbed)


@pytest.mark.parametrize(
    ("first_to_last", "same_node", "count"), [(False, False, 2), (True, False, 2), (True, True, 3)]
)
def test_processes_give_the_tokens_of_one_process(stages: Stages, first_to_last: bool, same_node: bool, count: int):
    stages.spawn(count=count)
    stages.load()
    stages.start(first_to_last=first_to_last, same_node=same_node)
    engine = stages.run_engine()
    handles = engine.submit_all([(spec, lambda event: None) for spec in SPECS])
    results = [handle.wait(60) for handle in handles]
    check_engine(engine)
    with Pipeline(NEEDLE, 2, 1, chunk=CHUNK, pages=PAGES, page_size=PAGE, dtype=torch.float32, eos=(0,)) as pipeline:
        expected = pipeline.generate(*SPECS)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert [result.finish_reason for result in results] == [result.finish_reason for result in expected]
    assert len(results[-1].prompt) == 67
    for one, other in zip(results[-1].prompt[1:], expected[-1].prompt[1:], strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [best.token_id for best in one.top] == [best.token_id for best in other.top]
    for handle in stages.handles:
        reply = handle.probe()
        assert (reply.state, reply.error) == ("running", "")
        assert reply.layers_done > reply.steps_done > 0
        assert reply.resident_bytes > 1 << 20


METHODS = {method.name: method.input_type.name for method in pb.DESCRIPTOR.services_by_name["Stage"].methods}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "metadata", [[], token_metadata("wrong"), token_metadata(TOKEN[:-1])], ids=["no", "wrong", "cut"]
)
def test_every_method_needs_the_token(bare: Stages, method: str, metadata: list[tuple[str, str]]):
    takes_stream = method in ("Run", "Activations", "WriteKv")
    message = iter(()) if takes_stream else getattr(pb, METHODS[method])()
    with open_channel(f"unix:{bare.socket(0)}") as channel:
        call = getattr(rpc.StageStub(channel), method)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(message, metadata=metadata, timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def bare() -> Iterator[Stages]:
    """One process that listens and has nothing loaded."""
    with tempfile.TemporaryDirectory(prefix="lr") as folder:
        made = Stages(Path(folder))
        try:
            made.spawn(count=1)
            yield made
        finally:
            made.close()


def test_a_closed_handle_ends_the_process(running: Stages):
    running.run_engine().close()
    for handle, process in zip(running.handles, running.processes, strict=True):
        handle.close()
        handle.close()
        assert process.wait(20) == 0
        assert not running.socket(handle.shard.stage).exists()


def test_steps_out_of_order_of_life_are_refused(bare: Stages):
    handle = bare.handles[0]
    assert handle.probe().state == "created"
    with pytest.raises(StageError, match=r"this shard is created, not loaded \(FAILED_PRECONDITION\)"):
        handle.start(pb.StartRequest(num_pages=PAGES, page_size=PAGE), 10)
    stub = rpc.StageStub(handle._channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(iter(()), metadata=token_metadata(TOKEN), timeout=10))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def far(stages: Stages) -> Stages:
    """Two stages whose links go over gRPC, as between nodes."""
    stages.spawn()
    stages.load()
    stages.start(same_node=False)
    return stages


@pytest.mark.parametrize("links", ["running", "far"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_process_ends_the_running_request(links: str, stage: int, request: pytest.FixtureRequest):
    running: Stages = request.getfixturevalue(links)
    engine = running.run_engine()
    handle = long_request(engine)
    running.processes[stage].send_signal(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"stage \d shard 0"):
        handle.wait(5)
    assert time.monotonic() - began < 5
    with pytest.raises(EngineError):
        submit(engine, generation_spec([1], 1))
    other = running.handles[1 - stage]
    eventually(lambda: bool(other.probe().steps_done), 5)  # it answers, and does not wait for what will never come
    engine.close()
    assert running.processes[1 - stage].wait(10) == 0


@pytest.mark.parametrize("damage", ["payload", "shape"])
def test_a_damaged_frame_is_data_loss_and_ends_the_request(far: Stages, damage: str):
    running, engine = far, far.run_engine()
    handle = long_request(engine)
    if damage == "payload":
        frame = next(split(torch.zeros(1, 256), 1))[:-1] + b"?"
    else:
        frame = Header(1, 0, 1, 0, (2**63, 0), 0).pack(b"")
    stub = rpc.StageStub(running.handles[1]._channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Activations(iter([pb.Frame(data=frame)]), metadata=token_metadata(TOKEN), timeout=10)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    with pytest.raises(EngineError, match="stage"):
        handle.wait(10)


def is_refused(handle: GrpcStageHandle) -> bool:
    """Whether a shard serves another engine."""
    try:
        list(rpc.StageStub(handle._channel).Run(iter(()), metadata=token_metadata(TOKEN), timeout=10))
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.ALREADY_EXISTS
    return False


def test_one_engine_at_a_time(running: Stages):
    running.run_engine()
    eventually(lambda: running.handles[0].probe().state == "running", 10)
    eventually(lambda: is_refused(running.handles[0]), 10)


def test_a_plan_that_cannot_be_read_ends_the_request(running: Stages):
    engine = running.run_engine()
    ticket = long_request(engine)
    sample = pb.SampleSpec(params=pb.SamplingParams(temperature=-1))
    run = running.handles[0]._run
    assert run is not None
    run.plans.put(pb.StepPlans(plans=[pb.StepPlan(slices=[pb.SequenceSlice(sample=sample)])]))
    with pytest.raises(EngineError, match=r"stage 0 shard 0.*: a plan cannot be read: temperature"):
        ticket.wait(10)


@pytest.mark.parametrize("message", [b"\xff\xff", b"\x0a\x02\x08"], ids=["no message", "cut short"])
def test_bytes_that_are_no_message_end_the_run(running: Stages, message: bytes):
    """The engine hears of it at once, and the shard is free for another one."""
    run = running.handles[0]._channel.stream_stream("/longreach.stage.v1.Stage/Run")
    with pytest.raises(grpc.RpcError) as caught:
        list(run(iter([message]), metadata=token_metadata(TOKEN), timeout=10))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    eventually(lambda: not is_refused(running.handles[0]), 10)
    assert len(long_request(running.run_engine()).request.output) > 2


def test_a_second_engine_is_lost_at_once(running: Stages):
    """It hears why; the first goes on."""
    first = running.run_engine()
    other = GrpcStageHandle(running.handles[0].shard, f"unix:{running.socket(0)}", TOKEN)
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    other.connect(lambda results: None, lost.put)
    assert "an engine is connected already (ALREADY_EXISTS)" in lost.get(timeout=10)
    other._channel.close()
    assert len(long_request(first).request.output) > 2


def test_an_orphan_ends_by_itself(stages: Stages):
    stages.spawn("--orphan-timeout", "1", count=1)
    stages.load()
    stages.start()
    engine = stages.run_engine()
    handle = long_request(engine)
    time.sleep(1.5)
    assert stages.processes[0].poll() is None, "it lives while an engine is connected"
    engine.cancel(handle)
    handle.wait(10)
    stages.handles[0]._channel.close()  # as when the head is killed
    assert stages.processes[0].wait(10) == 3


def test_a_process_without_a_token_says_what_is_missing(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "workers.stage.server", "--socket", str(tmp_path / "s")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert TOKEN_VARIABLE in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_constrained_answers(running: Stages) -> None:
    """Masks reach the last stage: what it samples matches, beside an answer that runs ahead."""
    choices = ["amber", "the ancient river", "there"]
    specs = [
        generation_spec(
            [5, 6, 7], 40, SamplingParams(1.0, seed=seed), structured_outputs=Constraint("choice", json.dumps(choices))
        )
        for seed in range(3)
    ]
    engine = running.run_engine(tokenizer=TextTokenizer.open(NEEDLE))
    handles = [submit(engine, spec) for spec in (*specs, SPECS[1])]
    *constrained, free = (handle.wait(60) for handle in handles)
    assert {result.text for result in constrained} <= {*choices}
    closing = closing_ids(TextTokenizer.open(NEEDLE), 5, (), reasoning=True)
    prompt = TextTokenizer.open(NEEDLE).encode("What?<think>", literal=True)
    bounded = submit(engine, generation_spec(prompt, 60, thinking_budget=5, ignore_eos=True)).wait(60)
    assert list(bounded.token_ids[5 : 5 + len(closing)]) == closing
    assert list(free.token_ids) == list(submit(engine, SPECS[1]).wait(60).token_ids)
    check_engine(engine)
