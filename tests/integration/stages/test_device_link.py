"""Hidden states that go from device to device, over gloo between CPUs: whole pipelines, and peers that are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.common.errors import EngineError, StageError
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.fakes.stage import submit
from tests.support.oracles.integrity import check_engine
from tests.support.paths import ROOT
from tests.support.rigs.stage_processes import CHUNK, NEEDLE, PAGE, PAGES, Stages, long_request
from workers.transport.collectives import Collectives, GroupLost, join_group
from workers.transport.device import DeviceInbox, DeviceSender, Pair
from workers.transport.link import Inbox, LinkClosed, UnixSender

CPU = torch.device("cpu")
SPECS = [
    generation_spec([(7 * i) % 4000 + 5 for i in range(300)], 6, ignore_eos=True),
    generation_spec([11, 12, 13], 5, ignore_eos=True),
    generation_spec([9] * 67, 9, prompt_logprobs=2),
]

# --- pipelines -------------------------------------------------------------------------------------------------------


def run_pipeline(stages: Stages, count: int, direct: bool) -> list[tuple[int, ...]]:
    stages.spawn(count=count)
    stages.load()
    stages.start(direct=direct)
    engine = stages.run_engine()
    handles = engine.submit_all([(spec, lambda event: None) for spec in SPECS])
    answers = [tuple(handle.wait(60).token_ids) for handle in handles]
    check_engine(engine)
    return answers


@pytest.mark.parametrize("count", [2, 3])
def test_the_tokens_are_those_of_other_links(stages: Stages, count: int):
    answers = run_pipeline(stages, count, direct=True)
    with Pipeline(NEEDLE, 2, 1, chunk=CHUNK, pages=PAGES, page_size=PAGE, dtype=torch.float32, eos=(0,)) as pipeline:
        expected = pipeline.generate(*SPECS)
    assert answers == [tuple(result.token_ids) for result in expected]
    groups = [
        (bool(request.upstream_group), bool(request.downstream_group))
        for request in (stages._start_request(handle.shard, 0, True) for handle in stages.handles)
    ]
    assert groups == [(False, True), *[(True, True)] * (count - 2), (True, False)]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage_is_an_error_and_can_be_replaced(stages: Stages, stage: int):
    expected = run_pipeline(stages, 2, direct=True)
    engine = stages.engine
    assert engine is not None
    handle = long_request(engine)
    stages.processes[stage].send_signal(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"stage \d shard 0"):
        handle.wait(10)
    assert time.monotonic() - began < 10
    engine.stop()
    assert stages.handles[1 - stage].probe().state == "running", "it only lost a neighbour"
    stages.replace(stage, 1)
    engine = stages.run_engine()
    assert [tuple(submit(engine, spec).wait(60).token_ids) for spec in SPECS] == expected


def test_processes_end_in_order(stages: Stages):
    run_pipeline(stages, 2, direct=True)
    assert stages.engine is not None
    stages.engine.close()
    for handle in stages.handles:
        handle.close()
    assert [process.wait(20) for process in stages.processes] == [0, 0]


def test_a_neighbour_that_does_not_come_is_one_line(stages: Stages):
    """The other stage is not started: the group of both is not formed within the ten seconds of the test rig."""
    stages.spawn()
    stages.load()
    stages.direct = True
    first = stages.handles[0]
    with pytest.raises(
        StageError, match="stage 0 shard 0 while starting: the two ends of a link did not meet: "
    ) as caught:
        first.start(stages._start_request(first.shard, 0, True), 60)
    assert "\n" not in str(caught.value)
    assert first.probe().state == "failed"


# --- peers that are lost ---------------------------------------------------------------------------------------------

PEER = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from workers.transport.collectives import join_group
from workers.transport.device import DeviceInbox, DeviceSender, Pair
from workers.transport.link import Inbox, UnixSender
kind, folder = sys.argv[1], Path(sys.argv[2])
store = dist.FileStore(str(folder / "store"), 2)
cpu = torch.device("cpu")
if kind == "reduce":
    group = join_group(store, 1, 2, cpu, 60.0)
    group.all_reduce(torch.ones(3))
elif kind == "receive":
    inbox = DeviceInbox(Inbox(path=str(folder / "link")), Pair(store, 1, cpu, 60.0, 60.0), depth=1)
else:
    pair = Pair(store, 0, cpu, 60.0, 60.0)
    control = UnixSender(str(folder / "link"))
    DeviceSender(control, pair, 60.0).send(1, torch.ones(3))
    if kind == "announced":
        control.announce(2, torch.ones(3))
print("ready", flush=True)
time.sleep(600)
"""


class Peer:
    """A process at the other end of a group or link; it has done one operation and does no other."""

    def __init__(self, kind: str, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PEER, kind, str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self.store = dist.FileStore(str(folder / "store"), 2)

    def is_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peer]:
    made = Peer(request.param, tmp_path)
    yield made
    made.close()


def lose(peer: Peer, sign: signal.Signals, wait: Callable[[], object]) -> tuple[Exception, float]:
    """Send a signal to the peer while this process waits for it; returns the error, and seconds from the signal on."""
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait)
        time.sleep(0.3)
        assert not waiting.done()
        peer.process.send_signal(sign)
        began = time.monotonic()
        error = waiting.exception(30)
    assert isinstance(error, Exception)
    return error, time.monotonic() - began


@pytest.mark.parametrize("peer", ["reduce"], indirect=True)
@pytest.mark.parametrize(("sign", "limit_s", "within_s"), [(signal.SIGKILL, 60.0, 5.0), (signal.SIGSTOP, 2.0, 10.0)])
def test_a_peer_lost_in_a_reduction_is_an_error(peer: Peer, sign: signal.Signals, limit_s: float, within_s: float):
    """A dead one at once, one that is stopped at the limit of a step."""
    group: Collectives = join_group(peer.store, 0, 2, CPU, 60.0)
    group.limit(limit_s)
    assert group.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    peer.is_ready()
    error, seconds = lose(peer, sign, lambda: group.all_reduce(torch.ones(3)))
    assert isinstance(error, GroupLost)
    assert "the group of the stage broke" in str(error)
    assert seconds < within_s


def receiving(peer: Peer, folder: Path, limit_s: float) -> DeviceInbox:
    control = Inbox("activations", path=str(folder / "link"))
    return DeviceInbox(control, Pair(peer.store, 1, CPU, 60.0, limit_s))


@pytest.mark.parametrize("peer", ["silent", "announced"], indirect=True)
@pytest.mark.parametrize(("sign", "limit_s", "within_s"), [(signal.SIGKILL, 60.0, 5.0), (signal.SIGSTOP, 2.0, 10.0)])
def test_a_peer_lost_in_a_receive_is_an_error(
    peer: Peer, sign: signal.Signals, limit_s: float, within_s: float, tmp_path: Path
):
    """Whether it has announced what never comes, or said nothing."""
    inbox = receiving(peer, tmp_path, limit_s)
    assert inbox.take(1, 30.0, (3,), torch.float32).tolist() == [1.0] * 3
    peer.is_ready()
    error, seconds = lose(peer, sign, lambda: inbox.take(2, limit_s, (3,), torch.float32))
    assert isinstance(error, LinkClosed)
    assert "\n" not in str(error)
    assert seconds < within_s
    inbox.close()


@pytest.mark.parametrize("peer", ["receive"], indirect=True)
@pytest.mark.parametrize(("sign", "limit_s", "within_s"), [(signal.SIGKILL, 60.0, 5.0), (signal.SIGSTOP, 4.0, 10.0)])
def test_a_receiver_that_is_lost_is_an_error_for_the_sender(
    peer: Peer, sign: signal.Signals, limit_s: float, within_s: float, tmp_path: Path
):
    """It takes nothing, so the sender waits for room."""
    pair = Pair(peer.store, 0, CPU, 60.0, limit_s)
    peer.is_ready()
    sender = DeviceSender(UnixSender(str(tmp_path / "link")), pair, limit_s, depth=1)

    def send() -> None:
        for step in range(20):
            sender.send(step, torch.zeros(1 << 22))

    error, seconds = lose(peer, sign, send)
    assert isinstance(error, LinkClosed)
    assert seconds < within_s
    sender.close()
