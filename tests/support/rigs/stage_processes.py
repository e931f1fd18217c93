"""Real stage processes over Unix sockets, without Ray: the needle checkpoint in as many stages as a test asks for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster.config.topology import plan_shards
from cluster.engine.engine import Engine
from cluster.engine.request_handle import RequestHandle
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.stages.handle import GrpcStageHandle
from cluster.stages.launcher import links_of
from protos.model.config_json import load_model_spec
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import StageAddress
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
        self.engine: Engine | None = None

    def spawn(self, *options: str, count: int = 2) -> None:
        shards = plan_shards(load_model_spec(NEEDLE), count, 1)
        environment = os.environ | {TOKEN_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)}
        for shard in shards:
            command = [sys.executable, "-m", "workers.stage.server", "--socket", str(self.socket(shard.stage))]
            self.processes.append(
                subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            )
        for shard, process in zip(shards, self.processes, strict=True):
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address == f"unix:{self.socket(shard.stage)}"
            self.handles.append(GrpcStageHandle(shard, address, TOKEN))

    def socket(self, stage: int) -> Path:
        return self.folder / f"s{stage}.sock"

    def load(self) -> None:
        spec = load_model_spec(NEEDLE).to_json()
        for handle in self.handles:
            request = pb.LoadRequest(
                model_path=str(NEEDLE), model_spec_json=spec, shard=codec.encode(handle.shard),
                dtype="float32", device="cpu", load_format="auto", group_timeout_s=10,
                store_path=str(self.folder / f"{handle.shard.stage}.store"),
            )  # fmt: skip
            updates = list(handle.load(request, 60))
            assert updates[-1].ready
            assert updates[-1].loaded_bytes == updates[-1].total_bytes > 0

    def start(self, *, first_to_last: bool = False, same_node: bool = True, kv_store_path: str = "") -> None:
        """Link the stages by Unix sockets, or over gRPC as if each had a node of its own."""
        for handle in self.handles if first_to_last else reversed(self.handles):
            shard = handle.shard
            addresses = {
                (stage, 0): StageAddress("", f"unix:{self.socket(stage)}", "" if same_node else str(stage), 0)
                for stage in range(shard.num_stages)
            }
            links = links_of(shard, addresses, self.folder)
            request = pb.StartRequest(num_pages=PAGES, page_size=PAGE, kv_store_path=kv_store_path, **links)
            handle.start(request, 60)

    def run_engine(self) -> Engine:
        scheduler = Scheduler(PagePool(PAGES), PAGE, CHUNK, 8, num_stages=len(self.handles))
        self.engine = Engine(scheduler, self.handles, None, (0,))
        self.engine.start()
        return self.engine

    def close(self) -> None:
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
