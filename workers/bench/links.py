"""What a link between two stages costs: a Unix socket, gRPC in plain text, gRPC with TLS, from device to device.

Two processes on this machine send each other the hidden states of a decode step and of a chunk, as stages do. Between
machines the network comes on top, the same for plain text and TLS. From device to device it is gloo between CPUs, which
no stage uses, and NCCL between the first two GPUs. On GPUs all times are from one GPU to the other.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS, TokenInterceptor, add_tcp_port
from protos.stage.identity import Identity, LaunchAuthority, shard_name
from workers.bench.timing import Figure, median_figure
from workers.transport.completion import wait_for_device
from workers.transport.device import DeviceInbox, DeviceSender, Pair
from workers.transport.link import GrpcSender, Inbox, Sender, UnixSender

KINDS = ("Unix socket", "gRPC", "gRPC with TLS", "device to device")
_TOKEN = "0" * 64
_TIMEOUT_S = 120.0
_STEP_TRIPS = 50  # round trips of a decode step's hidden states behind one value


@dataclass(frozen=True, slots=True)
class LinkSetup:
    """What is sent: `rows` is 1 in a decode step."""

    hidden: int
    chunk: int
    dtype: torch.dtype
    repeats: int
    device: str = "cpu"  # or cuda: two GPUs


class _End(rpc.StageServicer):
    """One of the two ends: an inbox, and a sender to the other one once `connect` is called."""

    def __init__(self, folder: Path, kind: str, number: int, identity: Identity, device: str) -> None:
        self._folder, self._kind, self._number = folder, kind, number
        self._identity = identity if kind == KINDS[2] else None
        self._server: Any = None
        self.device = torch.device(device, number) if device == "cuda" else torch.device(device)
        self.address = str(folder / f"{kind.replace(' ', '-')}{number}") if kind in (KINDS[0], KINDS[3]) else ""
        self._inbox = Inbox(path=self.address, pin=device == "cuda")
        self.inbox: Inbox | DeviceInbox = self._inbox
        if not self.address:
            self._server = grpc.server(
                futures.ThreadPoolExecutor(2), interceptors=[TokenInterceptor(_TOKEN)], options=CHANNEL_OPTIONS
            )
            rpc.add_StageServicer_to_server(self, self._server)
            self.address = add_tcp_port(self._server, "127.0.0.1", self._identity)
            self._server.start()
        self.sender: Sender | DeviceSender | None = None

    def connect(self, address: str) -> None:
        name = shard_name(1 - self._number, 0)
        if self._kind == KINDS[0]:
            self.sender = UnixSender(address)
        elif self._kind == KINDS[3]:
            pairs = [self._meet(first) for first in range(2)]  # in the same order at both ends
            self.sender = DeviceSender(UnixSender(address), pairs[self._number], _TIMEOUT_S)
            self.inbox = DeviceInbox(self._inbox, pairs[1 - self._number])
        else:
            self.sender = GrpcSender(address, _TOKEN, identity=self._identity, name=name)

    def _meet(self, first: int) -> Pair:
        """Meet the other end for the transfers from end `first`."""
        store = torch.distributed.FileStore(str(self._folder / f"from{first}.store"), 2)
        return Pair(store, int(self._number != first), self.device, _TIMEOUT_S, _TIMEOUT_S)

    def Activations(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> pb.ActivationsEnd:
        reason, _ = self.inbox.feed(frame.data for frame in frames)
        context.abort(grpc.StatusCode.CANCELLED, reason)
        return pb.ActivationsEnd()

    def send(self, step: int, tensor: torch.Tensor) -> None:
        assert self.sender is not None, "connect comes first"
        self.sender.send(step, tensor)

    def take(self, step: int, rows: int, setup: LinkSetup) -> torch.Tensor:
        """Return what came, when the device has it."""
        tensor = self.inbox.take(step, _TIMEOUT_S, (rows, setup.hidden), setup.dtype)
        tensor = tensor.to(self.device, non_blocking=True)
        wait_for_device(self.device, _TIMEOUT_S, self.inbox.check)
        return tensor

    def close(self) -> None:
        self.inbox.close()
        if self.sender is not None:
            self.sender.close()
        if self._server is not None:
            self._server.stop(0).wait()


def _echo(folder: Path, identity: Identity, setup: LinkSetup, pipe: Connection) -> None:
    """Send back what comes, in a process of its own: for each (kind, rows, count) that the pipe brings."""
    torch.set_num_threads(1)
    ends = {kind: _End(folder, kind, 1, identity, setup.device) for kind in KINDS}
    pipe.send({kind: end.address for kind, end in ends.items()})
    for kind, address in pipe.recv().items():
        ends[kind].connect(address)
    try:
        while (asked := pipe.recv()) is not None:
            kind, rows, first, count = asked
            end = ends[kind]
            for step in range(first, first + count):
                end.send(step, end.take(step, rows, setup))
    finally:
        for end in ends.values():
            end.close()


def measure_links(setup: LinkSetup) -> Iterator[Figure]:
    """Yield the milliseconds from one process to the other, half of a round trip, by kind of link; and what TLS adds.

    The kinds take turns, so that a machine whose speed drifts does not favour one.

    Raises:
        ValueError: there are not two GPUs, or the other process did not start.
    """
    if setup.device == "cuda" and torch.cuda.device_count() < 2:
        raise ValueError("device: cuda: links between GPUs need two of them")
    authority = LaunchAuthority()
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="lr") as name:
        folder = Path(name)
        identity = authority.make_identity(shard_name(1, 0))
        peer = context.Process(target=_echo, args=(folder, identity, setup, other), daemon=True)
        peer.start()
        other.close()  # so that `recv` ends when the process does
        own = authority.make_identity(shard_name(0, 0))
        ends = {kind: _End(folder, kind, 0, own, setup.device) for kind in KINDS}
        try:
            with closing(pipe):
                _connect(pipe, ends)
                yield from _measure(setup, pipe, ends)
                pipe.send(None)
            peer.join(_TIMEOUT_S)
        finally:
            peer.kill()
            peer.join()
            for end in ends.values():
                end.close()


def _connect(pipe: Connection, ends: dict[str, _End]) -> None:
    if not pipe.poll(_TIMEOUT_S):
        raise ValueError(f"the other process did not start within {_TIMEOUT_S:g} s")
    addresses = pipe.recv()
    pipe.send({kind: end.address for kind, end in ends.items()})
    for kind, end in ends.items():
        end.connect(addresses[kind])


def _measure(setup: LinkSetup, pipe: Connection, ends: dict[str, _End]) -> Iterator[Figure]:
    steps = dict.fromkeys(KINDS, 0)
    for what, rows, trips in (("a decode step", 1, _STEP_TRIPS), (f"a chunk of {setup.chunk}", setup.chunk, 1)):
        tensor = torch.zeros(rows, setup.hidden, dtype=setup.dtype, device=ends[KINDS[0]].device)
        values: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for repeat in range(-1, setup.repeats):  # the first is to warm up
            for kind, end in ends.items():
                pipe.send((kind, rows, steps[kind], trips))
                began = time.perf_counter()
                for step in range(steps[kind], steps[kind] + trips):
                    end.send(step, tensor)
                    end.take(step, rows, setup)
                steps[kind] += trips
                if repeat >= 0:
                    values[kind].append((time.perf_counter() - began) * 1e3 / (2 * trips))
        for kind in KINDS:
            yield median_figure(f"link, {what} x {setup.hidden}, {kind}", values[kind], "ms")
        added = [tls - plain for plain, tls in zip(values[KINDS[1]], values[KINDS[2]], strict=True)]
        share = statistics.median(added) / statistics.median(values[KINDS[1]])
        yield median_figure(f"link, {what} x {setup.hidden}, what TLS adds", added, "ms", f"{share:+.0%} of gRPC")
