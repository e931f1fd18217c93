"""Starts, repairs and stops a pipeline: places the stage actors, loads weights, connects stages.

Order of starting: checks on the head node, Ray, placement, actors listen, checks on every node, weights, KV and links.
Whatever fails, everything that was started is stopped before the error leaves `start`. Order of stopping: the engine's
runs, the actors, their placement; Ray stays for the next pipeline.

A repair replaces all shards of the stages that are gone or hang, and links them with the others, which keep processes,
weights and KV pages. The number of the epoch rises with it; it is part of the names of sockets and rendezvous files,
and of everything that processes send each other. This is the only module of the control plane that
imports `workers`, and it does so lazily: the actor class is imported in `start`, and imports torch only in the actor.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from cluster.common.errors import PlacementError, StageError
from cluster.common.text_format import one_line
from cluster.config.deployment import Deployment
from cluster.config.memory_budget import compute_dtype, kv_dtype, rehearsed_context, step_tokens, weight_bytes
from cluster.stages.handle import GrpcStageHandle
from cluster.stages.links import links_of
from cluster.stages.preflight import check_head, count_pages
from cluster.stages.ray_cluster import RayCluster
from cluster.stages.socket_dirs import RunDir, make_run_dir
from protos.node.environment import build_id
from protos.node.node_check import NodeCheck
from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.identity import HEAD, Identity, LaunchAuthority, shard_name
from protos.stage.messages import LoadProgress, ShardSpec, StageAddress, StageProcessSpec

_OPEN_TIMEOUT_S = 60.0  # a Python process with Ray starts within seconds even on a busy machine
_START_TIMEOUT_S = 180.0
_REPLACE_TIMEOUT_S = 120.0  # until Ray has noticed that a node is gone, and found another one
_RETRY_S = 1.0
_PROBE_TIMEOUT_S = 10.0
_REPORT_S = 0.5  # between reports while stages start: whoever is told may end the start by an exception
_log = logging.getLogger(__name__)


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
    epoch: int = 1  # rises with every repair
    kernel_family: str = ""  # of all shards: kernels that compute KV


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
        self._shards: dict[tuple[int, int], GrpcStageHandle] = {}  # by stage and rank
        self._addresses: dict[tuple[int, int], StageAddress] = {}
        self._gpus: dict[tuple[int, int], str] = {}  # identifiers; empty: on a CPU
        self._run_dir: RunDir | None = None
        self._token = ""
        self._authority: LaunchAuthority | None = None  # signs certificates of processes that listen beyond their node
        self._identity: Identity | None = None  # of this process
        self._family = ""  # of the kernels
        self._epoch = 1

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

    def repair(self, launched: Launched, stages: Collection[int]) -> Launched:
        """Replace the shards of some stages of a pipeline that no engine is connected to; link the others again.

        Raises:
            NodeError, CheckpointError, PlacementError, StageError: nothing is left running.
        """
        try:
            return self._repair(launched, stages)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop in order; what is already gone is skipped."""
        with contextlib.ExitStack() as steps:  # each runs whatever happens in the others; last added, first run
            if self._run_dir is not None:
                steps.callback(self._run_dir.remove)
            steps.callback(self._ray.release)
            for handle in self._shards.values():
                steps.callback(handle.close)
            self._shards, self._run_dir = {}, None

    # --- steps -------------------------------------------------------------------------------------------------------

    def _start(self) -> Launched:
        self._on_status(LaunchStatus("checking the checkpoint"))
        fingerprint = check_head(self._deployment)
        self._on_status(LaunchStatus("starting Ray"))
        self._place()
        self._on_status(LaunchStatus("starting stages"))
        self._run_dir = make_run_dir()
        self._token = secrets.token_hex(32)
        if not self._ray.is_local and self._deployment.config.cluster.inter_node_tls:
            self._authority = LaunchAuthority()
            self._identity = self._authority.make_identity(HEAD)
        self._open(self._deployment.shards, fingerprint, _OPEN_TIMEOUT_S)
        loaded = self._load(self._deployment.shards)
        max_shards_per_node = max(Counter(address.node for address in self._addresses.values()).values())
        num_pages = count_pages(self._deployment, loaded, max_shards_per_node)
        self._connect(num_pages, self._deployment.shards)
        self._family = "+".join(sorted({progress.kernel_family for progress in loaded}))
        return self._launched(fingerprint, num_pages)

    def _repair(self, launched: Launched, stages: Collection[int]) -> Launched:
        names = ", ".join(map(str, sorted(stages)))
        self._epoch += 1
        shards = [shard for shard in self._deployment.shards if shard.stage in stages]
        for handle in self._shards.values():
            handle.abandon() if handle.shard.stage in stages else handle.disconnect()
        if shards:
            self._on_status(LaunchStatus(f"replacing stage {names}"))
            self._replace(shards, launched.fingerprint)
            families = {progress.kernel_family for progress in self._load(shards)}
            if not families <= set(launched.kernel_family.split("+")):
                raise StageError(f"stage {names}: computes with {'+'.join(families)}, not {launched.kernel_family}")
        self._connect(launched.num_pages, shards)
        return self._launched(launched.fingerprint, launched.num_pages)

    def _launched(self, fingerprint: str, num_pages: int) -> Launched:
        order = [(shard.stage, shard.rank) for shard in self._deployment.shards]
        shards, pids = tuple(self._shards[at] for at in order), tuple(self._addresses[at].pid for at in order)
        dtype = compute_dtype(self._deployment)
        return Launched(shards, num_pages, fingerprint, dtype, pids, self._epoch, self._family)

    def _place(self) -> None:
        cluster = self._deployment.config.cluster
        self._ray.connect()
        from workers.stage.actor import StageActor  # imports no torch yet

        cores = self._ray.cores_of_a_pipeline(cluster.pipeline_parallel_size)
        gpus = 1.0 if cluster.device == "cuda" else 0.0
        self._actors = self._ray.place(
            StageActor, cluster.pipeline_parallel_size, cluster.expert_parallel_size, cluster.cpus(cores), gpus
        )

    def _replace(self, shards: Sequence[ShardSpec], fingerprint: str) -> None:
        """Place other actors for shards and make them listen.

        Where the node is gone, an actor may be given to it until Ray has noticed; Ray then finds room on another one.
        """
        from workers.stage.actor import StageActor  # imports no torch yet

        end = time.monotonic() + _REPLACE_TIMEOUT_S
        while True:
            for stage in {shard.stage for shard in shards}:
                self._actors[stage] = self._ray.replace(StageActor, stage)
            try:
                self._open(shards, fingerprint, max(1.0, min(_OPEN_TIMEOUT_S, end - time.monotonic())))
                return
            except PlacementError as error:
                if self._ray.lost or time.monotonic() + _RETRY_S > end:
                    raise
                _log.warning("waiting for a node with room: %s", one_line(error))
                self._on_status(LaunchStatus(f"waiting for a node with room ({one_line(error, 100)})"))
                time.sleep(_RETRY_S)

    def _open(self, shards: Sequence[ShardSpec], fingerprint: str, timeout_s: float) -> None:
        """Make shards listen and check their nodes."""
        config = self._deployment.config
        assert self._run_dir is not None
        threads = config.cluster.threads(self._ray.cores_of_a_pipeline(config.cluster.pipeline_parallel_size))
        check = NodeCheck(build_id(), str(config.model.path), fingerprint, str(config.data_dir))
        end = time.monotonic() + timeout_s
        certificates = self._sign_certificates(shards, timeout_s)
        calls = []
        for shard, certificate in zip(shards, certificates, strict=True):
            spec = StageProcessSpec(
                token=self._token,
                socket=str(self._run_dir.path / f"s{shard.stage}r{shard.rank}e{self._epoch}.sock"),
                listen_tcp=not self._ray.is_local,
                network_interface=config.cluster.network_interface,
                threads=threads,
                step_timeout_s=config.cluster.step_timeout_s,
                orphan_timeout_s=config.cluster.load_timeout_s + _START_TIMEOUT_S,  # others may still load
                certificate=certificate,
                authority=self._authority.certificate if self._authority is not None else b"",
            )
            calls.append(self._actors[shard.stage][shard.rank].open.remote(spec, check))
        addresses: list[StageAddress] = self._ray.call(calls, max(1.0, end - time.monotonic()))
        self._ray.serve({shard.stage for shard in shards})
        here = self._ray.node_id()
        for shard, address in zip(shards, addresses, strict=True):
            reachable = address.unix if address.node == here else address.tcp
            self._addresses[shard.stage, shard.rank] = address
            self._shards[shard.stage, shard.rank] = GrpcStageHandle(shard, reachable, self._token, self._identity)

    def _sign_certificates(self, shards: Sequence[ShardSpec], timeout_s: float) -> list[bytes]:
        """Return a certificate for the process of each shard; empty ones where nothing leaves a node, or without TLS.

        Ray carries the requests and certificates, which are no secret; the keys stay where they were made.
        """
        if self._authority is None:
            return [b""] * len(shards)
        actors = [self._actors[shard.stage][shard.rank] for shard in shards]
        requests = self._ray.call([actor.request_certificate.remote() for actor in actors], timeout_s)
        names = [shard_name(shard.stage, shard.rank) for shard in shards]
        return [self._authority.sign(request, name) for request, name in zip(requests, names, strict=True)]

    def _load(self, shards: Sequence[ShardSpec]) -> list[LoadProgress]:
        """Load shards, all at once; returns their closing messages in the order of `shards`."""
        config = self._deployment.config
        updates: queue.SimpleQueue[tuple[int, LoadProgress | BaseException]] = queue.SimpleQueue()
        for index, shard in enumerate(shards):
            handle = self._shards[shard.stage, shard.rank]
            request = self._load_request(shard)
            limit = config.cluster.load_timeout_s
            threading.Thread(target=_follow, args=(index, handle, request, limit, updates), daemon=True).start()
        latest = [LoadProgress(0, 0)] * len(shards)
        sizes = [weight_bytes(self._deployment, shard) for shard in shards]
        while not all(progress.ready for progress in latest):
            index, update = updates.get()
            if isinstance(update, BaseException):
                raise update
            latest[index] = update
            self._gpus[shards[index].stage, shards[index].rank] = update.gpu
            self._on_status(LaunchStatus("loading weights", loaded_bytes(sizes, latest), sum(sizes)))
        return latest

    def _load_request(self, shard: ShardSpec) -> pb.LoadRequest:
        config = self._deployment.config
        context, token_bytes = rehearsed_context(self._deployment)
        return pb.LoadRequest(
            model_path=str(config.model.path),
            model_spec_json=self._deployment.spec.to_json(),
            shard=codec.encode(shard),
            dtype=compute_dtype(self._deployment),
            device=config.cluster.device,
            load_format=config.model.load_format,
            store_path=self._meeting(shard),
            # ranks may finish loading that far apart
            group_timeout_s=max(config.cluster.step_timeout_s, config.cluster.load_timeout_s),
            largest_step=step_tokens(self._deployment) if config.cluster.device == "cuda" else 0,
            sampled_rows=config.prefill.max_num_seqs,
            max_model_len=context,
            context_token_bytes=token_bytes,
            page_size=config.kv_cache.page_size,
            kv_dtype=kv_dtype(self._deployment),
        )

    def _meeting(self, shard: ShardSpec) -> str:
        """Return the path of the rendezvous file of a shard's stage in this epoch."""
        assert self._run_dir is not None
        return str(self._run_dir.path / f"stage{shard.stage}e{self._epoch}.store")

    def _connect(self, num_pages: int, new: Collection[ShardSpec]) -> None:
        """Start the shards `new` and link the others with them; all at once, since those of a stage meet."""
        self._on_status(LaunchStatus("connecting stages"))
        config = self._deployment.config
        page_size, dtype = config.kv_cache.page_size, kv_dtype(self._deployment)
        graph_rows = config.prefill.max_num_seqs if config.cluster.cuda_graphs else 0
        assert self._run_dir is not None
        run_dir = self._run_dir.path
        kv_store_path = str(self._deployment.kv_store_path or "")

        def start(handle: GrpcStageHandle) -> None:
            links = links_of(handle.shard, self._addresses, self._gpus, run_dir, self._epoch)
            request = pb.StartRequest(
                num_pages=num_pages, page_size=page_size, kv_dtype=dtype, kv_store_path=kv_store_path,
                epoch=self._epoch, store_path=self._meeting(handle.shard),
                kv_block_tokens=config.kv_store.block_tokens, trace=config.cluster.trace_steps,
                graph_rows=graph_rows, **links,
            )  # fmt: skip
            is_new = handle.shard in new
            (handle.start if is_new else handle.relink)(request, _START_TIMEOUT_S)

        threads = ThreadPoolExecutor(len(self._shards))
        started = [threads.submit(start, handle) for handle in self._shards.values()]
        threads.shutdown(wait=False)  # after an error, `close` ends the calls of the others
        pending = set(started)
        while pending:
            done, pending = wait(pending, _REPORT_S, FIRST_COMPLETED)
            for future in done:
                future.result()
            self._on_status(LaunchStatus("connecting stages"))


def broken_stages(shards: Sequence[GrpcStageHandle], timeout_s: float = _PROBE_TIMEOUT_S) -> frozenset[int]:
    """Return the stages with a shard that does not answer in time or has failed by itself.

    A shard that only lost a neighbour, whose error often comes first, is sound.
    """

    def is_broken(handle: GrpcStageHandle) -> bool:
        try:
            return handle.probe(timeout_s).state != "running"
        except StageError:
            return True

    with ThreadPoolExecutor(len(shards)) as threads:
        answers = list(threads.map(is_broken, shards))
    return frozenset(handle.shard.stage for handle, broken in zip(shards, answers, strict=True) if broken)


def loaded_bytes(sizes: Sequence[int], latest: Sequence[LoadProgress]) -> int:
    """Return the bytes that shards of these sizes have loaded; while they load they count weights, not bytes."""
    return sum(
        round(size * progress.loaded_bytes / progress.total_bytes) if progress.total_bytes else 0
        for size, progress in zip(sizes, latest, strict=True)
    )


def _follow(
    index: int, handle: GrpcStageHandle, request: pb.LoadRequest, limit_s: float,
    updates: queue.SimpleQueue[tuple[int, LoadProgress | BaseException]],
) -> None:  # fmt: skip
    try:
        for progress in handle.load(request, limit_s):
            updates.put((index, progress))
    except BaseException as error:  # noqa: BLE001 - `_load` waits for the last update of each shard
        updates.put((index, error))
