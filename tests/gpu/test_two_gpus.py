"""NCCL between two processes with a GPU each: reductions and links from device to device, and a peer that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not dist.is_nccl_available(),
    reason="two CUDA devices and NCCL are needed",
)

COMMON = """
import os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from workers.stage.gpu import use_gpu
from workers.transport.collectives import GroupLost, join_group
from workers.transport.completion import DeviceLate, wait_for_device
from workers.transport.device import DeviceInbox, DeviceSender, Pair
from workers.transport.link import Inbox, LinkClosed, UnixSender
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
device = use_gpu(rank)
store = dist.FileStore(str(folder / "store"), 2)
path = str(folder / "link")

def sample(step):
    rows = (1, 17, 2048, 193, 0)[step % 5]
    return torch.randn(rows, 2048, generator=torch.Generator().manual_seed(step)).bfloat16().to(device)
"""
REDUCE = """
group = join_group(store, rank, 2, device, 60.0)
for step in range(20):
    total = group.all_reduce(torch.full((1000, 2048), float(rank + step), device=device))
    wait_for_device(device, 30.0, group.check)
    assert (total == 2 * step + 1).all()
if rank == 1:
    os._exit(0)  # as if it were killed
total = group.all_reduce(torch.ones(1000, 2048, device=device))
try:
    wait_for_device(device, 3.0, group.check)
    raise SystemExit("the reduction with a dead peer has ended")
except DeviceLate:
    group.abort("late")
wait_for_device(device, 10.0)
try:
    group.check()
    raise SystemExit("a reduction that was aborted counts")
except GroupLost:
    print("as promised")
"""
LINK = """
if rank == 0:
    inbox = DeviceInbox(Inbox("activations", path=path), Pair(store, 1, device, 60.0, 30.0))
    for step in range(40):
        due = sample(step)
        got = inbox.take(step, 30.0, due.shape, torch.bfloat16)
        out = got * 1
        wait_for_device(device, 30.0, inbox.check)
        assert torch.equal(out, due), step
    try:  # announced, but the peer dies
        out = inbox.take(40, 30.0, (1000, 2048), torch.bfloat16) * 1
        wait_for_device(device, 30.0, inbox.check)
        raise SystemExit("what was never sent has come")
    except LinkClosed:
        pass
    wait_for_device(device, 10.0)
    inbox.close()
    print("as promised")
else:
    pair = Pair(store, 0, device, 60.0, 30.0)
    while not os.path.exists(path):
        time.sleep(0.01)
    control = UnixSender(path)
    sender = DeviceSender(control, pair, 30.0)
    for step in range(40):
        sender.send(step, sample(step))
    torch.cuda.synchronize(device)
    control.announce(40, torch.empty(1000, 2048, dtype=torch.bfloat16, device="meta"))
    time.sleep(2.0)
    os._exit(0)  # as if it were killed
"""


@pytest.mark.parametrize("work", [REDUCE, LINK], ids=["reduction", "link"])
def test_a_dead_peer_is_an_error_and_ends_nobody_else(work: str, tmp_path: Path) -> None:
    """Before that, everything comes as it was sent."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMON + work, str(rank), str(tmp_path)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said, _ = processes[0].communicate(timeout=150)
        assert processes[0].returncode == 0, said
        assert said.splitlines()[-1] == "as promised"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
