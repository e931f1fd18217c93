"""Starts and stops a pipeline: places the stage actors, loads weights, connects stages, hands the shards to the engine.

Order of starting: checks on the head node, Ray, placement, actors listen, checks on every node, weights, KV and links.
Whatever fails, everything that was started is stopped before the error leaves `start`. Order of stopping: the engine's
runs, the actors, their placement; Ray stays for the next pipeline. This is the only module of the control plane that
imports `workers`, and it does so lazily: the actor class is imported in `start`, and imports torch only in the actor.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.deployment import Config, Deployment
from cluster.config.memory_budget import DTYPE_BYTES, compute_dtype, kv_dtype
from cluster.config.topology import shard_weight_bytes
from cluster.stages.handle import GrpcStageHandle
from cluster.stages.preflight import check_head, count_pages
from cluster.stages.ray_cluster import RayCluster
from cluster.stages.socket_dirs import RunDir, make_run_dir
from protos.node.environment import build_id
from protos.node.node_check import NodeCheck
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import LoadProgress, ShardSpec, StageAddress, StageProcessSpec

_OPEN_TIMEOUT_S = 60.0  # a Python process with Ray starts within seconds even on a busy machine
_START_TIMEOUT_S = 180.0
_REPORT_S = 0.5  # between reports while stages start: whoever is told may end the start by an exception


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """Progress of a launch; bytes are summed over all shards while weights load."""

    phase: str
    loaded_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Launched:
    """A running pipeline: shards ordered by stage then rank, and the sizes they allocated."""

    shards: tuple[GrpcStageHandle, ...]
    num_pages: int
    fingerprint: str
    dtype: str
    pids: tuple[int, ...]  # of the stage processes, each on its own node
    kernel_family: str = ""  # of all shards, joined with + where they differ


class Launcher:
    """One pipeline of one deployment. `start` once; `close` undoes it and may be called twice, at any point."""

    def __init__(
        self, deployment: Deployment, ray: RayCluster, on_status: Callable[[LaunchStatus], None] = lambda status: None
    ) -> None:
        """
        Args:
            ray: connected by `start`; `close` only releases its actors.
        """
        self._deployment = deployment
        self._ray = ray
        self._on_status = on_status
        self._actors: list[list[Any]] = []
        self._shards: list[GrpcStageHandle] = []
        self._run_dir: RunDir | None = None

    def start(self) -> Launched:
        """Start the pipeline.

        Raises:
            PreflightError, NodeError, CheckpointError, PlacementError, StageError: nothing is left running.
        """
        try:
            return self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop in order; what is already gone is skipped."""
        with contextlib.ExitStack() as steps:  # each runs whatever happens in the others; last added, first run
            if self._run_dir is not None:
                steps.callback(self._run_dir.remove)
            steps.callback(self._ray.release)
            for handle in self._shards:
                steps.callback(handle.close)
            self._shards, self._run_dir = [], None

    # --- steps -------------------------------------------------------------------------------------------------------

    def _start(self) -> Launched:
        self._on_status(LaunchStatus("checking the checkpoint"))
        fingerprint = check_head(self._deployment)
        self._on_status(LaunchStatus("starting Ray"))
        self._place()
        self._on_status(LaunchStatus("starting stages"))
        addresses = self._open(fingerprint)
        loaded = self._load()
        self._on_status(LaunchStatus("connecting stages"))
        max_shards_per_node = max(Counter(address.node for address in addresses).values())
        num_pages = count_pages(self._deployment, loaded, max_shards_per_node)
        self._connect(addresses, num_pages)
        pids = tuple(address.pid for address in addresses)
        family = "+".join(sorted({progress.kernel_family for progress in loaded}))
        return Launched(tuple(self._shards), num_pages, fingerprint, compute_dtype(self._deployment), pids, family)

    def _place(self) -> None:
        cluster = self._deployment.config.cluster
        self._ray.connect()
        from workers.stage.actor import StageActor  # imports no torch yet

        cores = self._ray.cores_of_a_pipeline(cluster.pipeline_parallel_size)
        gpus = 1.0 if cluster.device == "cuda" else 0.0
        self._actors = self._ray.place(
            StageActor, cluster.pipeline_parallel_size, cluster.expert_parallel_size, cluster.cpus(cores), gpus
        )

    def _open(self, fingerprint: str) -> list[StageAddress]:
        """Make every shard listen and check its node; returns the addresses in shard order."""
        config = self._deployment.config
        self._run_dir = make_run_dir()
        token = secrets.token_hex(32)
        threads = config.cluster.threads(self._ray.cores_of_a_pipeline(config.cluster.pipeline_parallel_size))
        check = NodeCheck(build_id(), str(config.model.path), fingerprint, str(config.data_dir))
        calls = []
        for shard in self._deployment.shards:
            spec = StageProcessSpec(
                token=token,
                socket=str(self._run_dir.path / f"s{shard.stage}r{shard.rank}.sock"),
                listen_tcp=not self._ray.is_local,
                network_interface=config.cluster.network_interface,
                threads=threads,
                step_timeout_s=config.cluster.step_timeout_s,
                orphan_timeout_s=config.cluster.load_timeout_s + _START_TIMEOUT_S,  # others may still load
            )
            calls.append(self._actors[shard.stage][shard.rank].open.remote(spec, check))
        addresses: list[StageAddress] = self._ray.call(calls, _OPEN_TIMEOUT_S)
        self._ray.serve()
        here = self._ray.node_id()
        for shard, address in zip(self._deployment.shards, addresses, strict=True):
            reachable = address.unix if address.node == here else address.tcp
            self._shards.append(GrpcStageHandle(shard, reachable, token))
        return addresses

    def _load(self) -> list[LoadProgress]:
        """Load all shards at once; returns their closing messages in shard order."""
        config = self._deployment.config
        updates: queue.SimpleQueue[tuple[int, LoadProgress | BaseException]] = queue.SimpleQueue()
        for index, handle in enumerate(self._shards):
            request = self._load_request(handle)
            limit = config.cluster.load_timeout_s
            threading.Thread(target=_follow, args=(index, handle, request, limit, updates), daemon=True).start()
        latest = [LoadProgress(0, 0)] * len(self._shards)
        width = DTYPE_BYTES[compute_dtype(self._deployment)]
        total = sum(shard_weight_bytes(self._deployment.spec, shard, width) for shard in self._deployment.shards)
        while not all(progress.ready for progress in latest):
            index, update = updates.get()
            if isinstance(update, BaseException):
                raise update
            latest[index] = update
            self._on_status(LaunchStatus("loading weights", sum(p.loaded_bytes for p in latest), total))
        return latest

    def _load_request(self, handle: GrpcStageHandle) -> pb.LoadRequest:
        config, shard = self._deployment.config, handle.shard
        assert self._run_dir is not None
        return pb.LoadRequest(
            model_path=str(config.model.path),
            model_spec_json=self._deployment.spec.to_json(),
            shard=codec.encode(shard),
            dtype=compute_dtype(self._deployment),
            device=config.cluster.device,
            load_format=config.model.load_format,
            store_path=str(self._run_dir.path / f"stage{shard.stage}.store"),
            # ranks may finish loading that far apart
            group_timeout_s=max(config.cluster.step_timeout_s, config.cluster.load_timeout_s),
        )

    def _connect(self, addresses: list[StageAddress], num_pages: int) -> None:
        """Start every shard; all at once, since the shards of a stage warm up together."""
        page_size, dtype = self._deployment.config.kv_cache.page_size, kv_dtype(self._deployment)
        store = kv_store_path(self._deployment.config)
        by_rank = {(s.stage, s.rank): a for s, a in zip(self._deployment.shards, addresses, strict=True)}
        assert self._run_dir is not None
        run_dir = self._run_dir.path

        def request(shard: ShardSpec) -> pb.StartRequest:
            links = links_of(shard, by_rank, run_dir)
            return pb.StartRequest(
                num_pages=num_pages, page_size=page_size, kv_dtype=dtype, kv_store_path=store, **links
            )

        threads = ThreadPoolExecutor(len(self._shards))
        started = [threads.submit(handle.start, request(handle.shard), _START_TIMEOUT_S) for handle in self._shards]
        threads.shutdown(wait=False)  # after an error, `close` ends the calls of the others
        pending = set(started)
        while pending:
            done, pending = wait(pending, _REPORT_S, FIRST_COMPLETED)
            for future in done:
                future.result()
            self._on_status(LaunchStatus("connecting stages"))


def kv_store_path(config: Config) -> str:
    """Return the folder of stored KV on every node; empty when there is none."""
    if not config.kv_store.enabled:
        return ""
    return str(config.kv_store.path or Path(config.data_dir) / "kv")


def links_of(shard: ShardSpec, addresses: dict[tuple[int, int], StageAddress], run_dir: Path) -> dict[str, str]:
    """Return the fields of a StartRequest that say how a shard is linked to the same rank of its neighbours.

    Stages form a ring: the last one sends its tokens to the first. Shards of one node share a Unix socket in `run_dir`,
    which every node has; others are linked over gRPC. `addresses` are those of all shards by stage and rank.
    """
    if shard.num_stages == 1:
        return {}

    def socket(stage: int) -> str:
        """Return the path of the socket between a stage and the one after it; empty if they are on two nodes."""
        same_node = addresses[stage, shard.rank].node == addresses[(stage + 1) % shard.num_stages, shard.rank].node
        return str(run_dir / f"link{stage}r{shard.rank}.sock") if same_node else ""

    before, after = (shard.stage - 1) % shard.num_stages, (shard.stage + 1) % shard.num_stages
    links = {"upstream_socket": socket(before), "downstream_socket": socket(shard.stage)}
    return links if links["downstream_socket"] else links | {"downstream": addresses[after, shard.rank].tcp}


def _follow(
    index: int, handle: GrpcStageHandle, request: pb.LoadRequest, limit_s: float,
    updates: queue.SimpleQueue[tuple[int, LoadProgress | BaseException]],
) -> None:  # fmt: skip
    try:
        for progress in handle.load(request, limit_s):
            updates.put((index, progress))
    except BaseException as error:  # noqa: BLE001 - `_load` waits for the last update of each shard
        updates.put((index, error))
