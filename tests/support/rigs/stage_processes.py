"""Real stage processes over Unix sockets, without Ray: the needle checkpoint in as many stages as a test asks for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.config.topology import plan_shards
from cluster.constraints.compiler import ConstraintCompiler
from cluster.engine.engine import Engine
from cluster.engine.request_handle import RequestHandle
from cluster.kv_store.store import KvStore
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.stages.handle import GrpcStageHandle
from cluster.stages.links import links_of
from cluster.text.tokenizer import TextTokenizer
from protos.model.config_json import load_model_spec
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import ShardSpec, StageAddress
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import submit
from tests.support.paths import ROOT
from workers.stage.server import TOKEN_VARIABLE

NEEDLE = ROOT / "configs" / "needle"
TOKEN = "0123456789abcdef"
PAGES, PAGE, CHUNK = 64, 16, 128


class Stages:
    """The processes of a pipeline, their handles, and whatever else must be closed at the end of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.handles: list[GrpcStageHandle] = []
        self.addresses: dict[int, str] = {}  # of stages that were replaced
        self.engine: Engine | None = None
        self.store: KvStore | None = None
        self.direct = False  # hidden states go from device to device
        self.kv_store_path = ""  # of the stages that are started next

    def spawn(self, *options: str, count: int = 2) -> None:
        """Start the processes beside each other."""
        shards = plan_shards(load_model_spec(NEEDLE), count, 1)
        processes = [self._start_process(self.socket(shard.stage), *options) for shard in shards]
        self.handles += [
            self._connect(process, shard, self.socket(shard.stage))
            for process, shard in zip(processes, shards, strict=True)
        ]

    def _start_process(self, socket: Path, *options: str) -> subprocess.Popen[str]:
        environment = os.environ | {TOKEN_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "workers.stage.server", "--socket", str(socket), *options]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process

    @staticmethod
    def _connect(process: subprocess.Popen[str], shard: ShardSpec, socket: Path) -> GrpcStageHandle:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address == f"unix:{socket}"
        return GrpcStageHandle(shard, address, TOKEN)

    def socket(self, stage: int) -> Path:
        return self.folder / f"s{stage}.sock"

    def load(self) -> None:
        with ThreadPoolExecutor(len(self.handles)) as threads:
            list(threads.map(self._load, self.handles))

    def _load(self, handle: GrpcStageHandle, epoch: int = 0) -> None:
        request = pb.LoadRequest(
            model_path=str(NEEDLE), model_spec_json=load_model_spec(NEEDLE).to_json(),
            shard=codec.encode(handle.shard), dtype="float32", device="cpu", load_format="auto", group_timeout_s=10,
            store_path=str(self.folder / f"{handle.shard.stage}e{epoch}.store"),
        )  # fmt: skip
        updates = list(handle.load(request, 60))
        assert updates[-1].ready
        assert updates[-1].loaded_bytes == updates[-1].total_bytes > 0

    def start(self, *, first_to_last: bool = False, same_node: bool = True, direct: bool = False) -> None:
        """Link the stages by Unix sockets, or over gRPC as if each had a node of its own.

        Args:
            direct: hidden states go from device to device, as if each stage had a GPU.
        """
        self.direct = direct
        if direct:  # neighbours meet
            self._all_at_once(lambda handle: handle.start, 0)
            return
        for handle in self.handles if first_to_last else reversed(self.handles):
            handle.start(self._start_request(handle.shard, 0, same_node), 60)

    def _all_at_once(
        self, call: Callable[[GrpcStageHandle], Callable[[pb.StartRequest, float], None]], epoch: int
    ) -> None:
        with ThreadPoolExecutor(len(self.handles)) as threads:
            list(threads.map(lambda one: call(one)(self._start_request(one.shard, epoch, True), 60), self.handles))

    def replace(self, stage: int, epoch: int, *, same_node: bool = True) -> None:
        """Put another process in the place of a stage, which may live on, and link the others with it."""
        self.handles[stage].abandon()
        shard, socket = self.handles[stage].shard, self.folder / f"s{stage}e{epoch}.sock"
        new = self.handles[stage] = self._connect(self._start_process(socket), shard, socket)
        self.addresses[stage] = f"unix:{self.folder}/s{stage}e{epoch}.sock"
        self._load(new, epoch)
        if self.direct:
            self._all_at_once(lambda handle: handle.start if handle is new else handle.relink, epoch)
            return
        for handle in self.handles:
            begin = handle.start if handle is new else handle.relink
            begin(self._start_request(handle.shard, epoch, same_node), 60)

    def _start_request(self, shard: ShardSpec, epoch: int, same_node: bool) -> pb.StartRequest:
        addresses = {
            (stage, 0): StageAddress(
                "", self.addresses.get(stage, f"unix:{self.socket(stage)}"), "" if same_node else str(stage), 0
            )
            for stage in range(shard.num_stages)
        }
        gpus = {at: str(at) for at in addresses} if self.direct else {}
        links = links_of(shard, addresses, gpus, self.folder, epoch)
        return pb.StartRequest(num_pages=PAGES, page_size=PAGE, epoch=epoch, kv_store_path=self.kv_store_path, **links)

    def run_engine(self, store: KvStore | None = None, tokenizer: TextTokenizer | None = None) -> Engine:
        """Start an engine; `store` is over the folder `kv_store_path`, with a `tokenizer` there are constraints."""
        pool = PagePool(PAGES)
        scheduler = Scheduler(
            pool, PAGE, CHUNK, 8, num_stages=len(self.handles), block_tokens=store.block_tokens if store else 0
        )
        constraints = ConstraintCompiler(tokenizer, 4096, [0]) if tokenizer is not None else None
        self.engine = Engine(scheduler, self.handles, tokenizer, (0,), store=store, constraints=constraints)
        if store is not None:
            store.attach(self.handles, self.engine.post, pool)
        self.store = store
        self.engine.start()
        return self.engine

    def close(self) -> None:
        if self.store is not None:
            self.store.detach()
        if self.engine is not None:
            self.engine.close()
        for handle in self.handles:
            handle.close()
        for process in self.processes:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


def eventually(condition: Callable[[], bool], limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, f"it did not happen within {limit_s} s"
        time.sleep(0.02)


def long_request(engine: Engine) -> RequestHandle:
    """A request that goes on for many steps; returns when it has begun to answer."""
    handle = submit(engine, generation_spec([5, 6, 7], 900, ignore_eos=True))
    eventually(lambda: len(handle.request.output) > 2, 30)
    return handle
