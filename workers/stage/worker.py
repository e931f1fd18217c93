"""The work of a shard's process with torch: load weights, allocate KV, execute plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from protos.jobs.convert import read_message
from protos.model.folder import on_this_node
from protos.model.spec import ModelSpec
from protos.stage import stage_pb2 as pb
from protos.stage.identity import Identity, shard_name
from protos.stage.messages import (
    LoadProgress,
    ShardSpec,
    StepPlan,
    StepResult,
)
from workers.attention.cuda import compute_family
from workers.kv.block_file import BlockShape, Part
from workers.kv.block_pages import BlockPages, open_pages
from workers.kv.block_store import BlockStore
from workers.kv.paged import PagedKV
from workers.model.weights import ShardWeights, dummy_shard, load_shard
from workers.runner.model_runner import ModelRunner
from workers.runner.paced import PacedRunner, read_pace
from workers.runner.rehearsal import StepSize, rehearse, warm_up
from workers.stage.gpu import check_kv_dtype, gpu_id, use_gpu
from workers.stage.plan_queue import PlanQueue, UnreadablePlan
from workers.stage.step import Stepper, max_unread
from workers.stage.tracer import Tracer
from workers.transport.collectives import Collectives, GroupLost, join_group
from workers.transport.device import DeviceInbox, DeviceSender, Pair
from workers.transport.link import DEPTH, GrpcSender, Inbox, LinkClosed, Sender, UnixSender

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KV_DTYPES = DTYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPE_NAMES = {dtype: name for name, dtype in KV_DTYPES.items()}
# Results of decode steps a message, and the longest time one is held back for it: every message wakes threads here and
# in the head process, on the cores that compute.
_BATCH, _BATCH_S = 8, 0.2
_LAZY_BATCH, _LAZY_BATCH_S = 64, 2.0  # the same of the shards whose results complete no step
_SLOW_S = 0.02  # a step that lasts as long as results take to the engine and plans back


class StageWorker:
    """One shard, from weights to results.

    Methods are called in the order load, start, run, close; `unlink` and `relink` end a run and prepare another one
    with other neighbours. All but `unlink` and `note_late` are called on the thread that computes.
    """

    def __init__(
        self, token: str, threads: int, step_timeout_s: float, identity: Identity | None = None, gpu: int = 0
    ) -> None:  # fmt: skip
        """Args: `gpu` is the index of the GPU of this shard among those that this process sees."""
        self._token = token
        self._gpu = gpu
        self._identity = identity
        self._step_timeout_s = step_timeout_s
        self.steps_done = 0
        self.inbox: Inbox | DeviceInbox | None = None
        self._sender: Sender | DeviceSender | None = None
        self._pair: Pair | None = None  # with the next stage
        self._runner: ModelRunner | None = None
        self._kv: PagedKV | None = None
        self._stepper: Stepper | None = None
        self._tracer: Tracer | None = None  # where results are to say when a step was computed
        self._weights: ShardWeights | None = None
        self._collectives = Collectives()
        self._plans: PlanQueue | None = None  # of the run
        self._error = ""
        self.is_broken = False  # it failed by itself, not because a neighbour is gone
        self.epoch = 0
        self.num_late = 0  # frames, plans and calls of earlier epochs that were refused
        torch.set_num_threads(threads)

    @property
    def error(self) -> str:
        """Why steps fail; "" while they do not."""
        return self._error

    @property
    def is_computing(self) -> bool:
        """Whether it is in a step, and not waiting for a neighbour."""
        return self._stepper is not None and self._stepper.is_computing

    def note_late(self, count: int = 1) -> None:
        """Count what came from an earlier epoch."""
        self.num_late += count

    @property
    def layers_done(self) -> int:
        return self._runner.decoder.layers_done if self._runner else 0

    def load(self, request: pb.LoadRequest, on_progress: Callable[[LoadProgress], None]) -> LoadProgress:
        """Read the weights and join the stage's group; returns the last progress message.

        Raises:
            ValueError: the checkpoint or the request is not usable, or the type of the KV cache is too new for the GPU.
            RuntimeError: the group did not form.
        """
        self._spec = ModelSpec.from_json(request.model_spec_json)
        self._shard = read_message(ShardSpec, request.shard)
        self._dtype = DTYPES[request.dtype]
        self._device = torch.device(request.device)
        if self._device.type == "cuda":
            self._device = use_gpu(self._gpu)
        self._kv_type(request.kv_dtype)  # before the minutes that weights take
        before = anonymous_bytes()
        if request.load_format == "dummy":
            self._weights = dummy_shard(self._spec, self._shard, self._dtype, self._device)
        else:
            self._weights = load_shard(
                on_this_node(Path(request.model_path)), self._spec, self._shard, self._dtype, self._device,
                lambda done, total: on_progress(LoadProgress(done, total)),
            )  # fmt: skip
        growth = max(0, anonymous_bytes() - before)
        self._meeting_s = request.group_timeout_s
        self._collectives = join_group(
            self._meeting(request.store_path), self._shard.rank, self._shard.num_ranks, self._device,
            self._meeting_s,
        )  # fmt: skip
        rehearsed = self._rehearse(request)
        total = self._weights.num_bytes
        family = compute_family(self._device, self._dtype, self._spec.head_dim)
        return LoadProgress(
            total, total, True, growth, self._available_bytes(), kernel_family=family, gpu=gpu_id(self._device),
            rehearsed_bytes=rehearsed,
        )  # fmt: skip

    def _rehearse(self, request: pb.LoadRequest) -> int:
        """Return what the largest step takes of a GPU's memory; 0 where none is asked for. Raises ValueError."""
        if not request.largest_step or self._device.type != "cuda":
            return 0
        assert self._weights is not None
        spec, shard, weights = self._spec, self._shard, self._weights
        dtype = self._kv_type(request.kv_dtype)
        kv = PagedKV(
            shard.layers.size, shard.kv_heads.size, spec.head_dim, 1, request.page_size, dtype, self._device
        )  # fmt: skip
        context, token_bytes = request.max_model_len, request.context_token_bytes
        if token_bytes:
            context = max(1, min(context, self._available_bytes() // token_bytes))
        size = StepSize(request.largest_step, context, request.page_size, max(1, request.sampled_rows))

        def make_runner(kv: PagedKV) -> ModelRunner:
            return ModelRunner(spec, shard, weights, kv, self._collectives, self._device)

        return rehearse(make_runner, kv, spec, size, torch.cuda, must_fit=not token_bytes)

    def _kv_type(self, name: str) -> torch.dtype:
        """Return the type of keys and values of this name, by default that of the weights.

        Raises:
            ValueError: it is unknown, or too new for the GPU.
        """
        if name and name not in KV_DTYPES:
            raise ValueError(f"kv_dtype: {name!r}: must be one of {', '.join(KV_DTYPES)}")
        dtype = KV_DTYPES[name] if name else self._dtype
        check_kv_dtype(dtype, self._device)
        return dtype

    def start(self, request: pb.StartRequest) -> None:
        """Allocate KV pages and listen for the previous stage; the next one is reached when the first run begins.

        Raises:
            ValueError: the type of the KV cache is unknown or too new for the GPU, or there is no next stage.
            LinkClosed: a neighbour that tensors go to from device to device did not come.
        """
        assert self._weights is not None, "load comes first"
        downstream, dtype = request.downstream or request.downstream_socket, self._kv_type(request.kv_dtype)
        if bool(downstream) != (self._shard.num_stages > 1):
            raise ValueError(f"downstream: {downstream!r}: must be set with several stages, and only then")
        layers, kv_heads = self._shard.layers.size, self._shard.kv_heads.size
        kv = PagedKV(layers, kv_heads, self._spec.head_dim, request.num_pages, request.page_size, dtype, self._device)
        self._kv, self._kv_dtype = kv, DTYPE_NAMES[dtype]
        collectives = self._collectives
        if request.trace:
            self._tracer = Tracer(collectives, self._spec.num_experts)
            collectives = self._tracer.collectives
        parts = self._spec, self._shard, self._weights, kv, collectives, self._device
        pace = read_pace(self._shard.stage)
        self._runner = ModelRunner(*parts) if pace is None else PacedRunner(*parts, seconds=pace)
        if self._tracer is not None and self._shard.rank == 0:
            self._runner.decoder.on_experts = self._tracer.count_experts
        warm_up(self._runner, request.page_size)
        if request.graph_rows and not request.trace:  # which counts the experts of every step
            self._runner.capture_decode(request.graph_rows)
        self._collectives.limit(self._step_timeout_s)
        self._listen(request)

    def open_kv_store(self, path: Path, block_tokens: int) -> tuple[BlockStore, BlockPages]:
        """Open the folder of stored KV, and the access to this shard's pages; as many as it fills have memory then.

        Args:
            block_tokens: of a stored block.

        Raises:
            ValueError: the folder cannot be used.
        """
        assert self._kv is not None, "start comes first"
        spec, kv = self._spec, self._kv
        shape = BlockShape(
            self._kv_dtype, spec.head_dim, spec.num_hidden_layers, spec.num_key_value_heads, kv.num_pages * kv.page_size
        )
        try:
            store = BlockStore(path, shape, Part(self._shard.layers, self._shard.kv_heads))
        except OSError as error:
            raise ValueError(
                f"kv_store.path: {path}: cannot be used ({error.strerror}): name a folder that this user can write to, "
                "or say kv_store.enabled: false"
            ) from error
        kv.commit(store.count() * block_tokens)
        return store, open_pages(kv, self._shard.layers.size)

    def unlink(self, epoch: int) -> None:
        """Begin an epoch: end the run, wake whatever waits for a neighbour, and take nothing of earlier epochs."""
        self.epoch = epoch
        if self._plans is not None:
            self._plans.end()
        self._close_links("stages are being replaced")
        self._collectives.abort("stages are being replaced")

    def relink(self, request: pb.StartRequest) -> None:
        """Forget every sequence, meet the other shards of the stage again, and listen for the previous stage.

        Raises:
            RuntimeError: this shard failed by itself, or another one of the stage did not come.
        """
        assert self._runner is not None, "start comes first"
        if self.is_broken:
            raise RuntimeError(self._error)
        self._close_links("stages are being replaced")  # those that were made while `unlink` ran
        self._collectives.close()  # which wakes those that wait for this shard
        self._runner.reset()
        self._stepper = self._sender = self.inbox = self._pair = None
        if self._shard.num_ranks > 1:
            self._collectives.join(self._meeting(request.store_path))
        self._error = ""
        self._listen(request)

    def _listen(self, request: pb.StartRequest) -> None:
        self.epoch = request.epoch
        self._links = request
        if request.downstream or request.downstream_socket:
            content, source = (
                ("tokens", "the last stage") if self._shard.is_first else ("activations", "the previous stage")
            )
            pin = self._device.type == "cuda" and not request.upstream_group
            inbox = Inbox(content, source, request.upstream_socket, request.epoch, self.note_late, pin)
            self.inbox = inbox
            if request.upstream_group:
                self.inbox = DeviceInbox(inbox, self._meet(request.upstream_group, 1), content)
        if request.downstream_group:
            self._pair = self._meet(request.downstream_group, 0)

    def _meet(self, path: str, rank: int) -> Pair:
        """Meet a neighbour at a rendezvous file. Raises LinkClosed."""
        store = torch.distributed.FileStore(path, 2)
        return Pair(store, rank, self._device, self._meeting_s, self._step_timeout_s)

    def _meeting(self, path: str) -> torch.distributed.Store:
        return torch.distributed.FileStore(path, self._shard.num_ranks)

    def _close_links(self, reason: str) -> None:
        if self.inbox is not None:
            self.inbox.close(reason)
        if self._sender is not None:
            self._sender.close(reason)
        if self._pair is not None:
            self._pair.close()

    def run(self, bursts: Iterable[Sequence[StepPlan]], epoch: int = 0) -> Iterator[list[StepResult]]:
        """Execute plans in order and yield their results, several at once while decode steps follow each other.

        Plans of another epoch than that of this shard are dropped, also when it changes in between.
        """
        self._plans = plans = PlanQueue(bursts, self.note_late)
        if epoch != self.epoch:
            self.note_late()
            plans.end()
            return
        try:
            self._stepper = self._stepper or self._connect()
            self._stepper.reset()
        except RuntimeError as error:
            self._fail(f": links: {' '.join(str(error).split())}")
        held: list[StepResult] = []
        batch, batch_s = (_BATCH, _BATCH_S) if self._completes_steps else (_LAZY_BATCH, _LAZY_BATCH_S)
        expected: int | None = None
        began = 0.0
        try:
            for plan in plans:
                if not self._error and expected is not None and plan.step != expected:
                    self._fail(f": plan {plan.step} came where {expected} was due", is_own=True)
                expected = plan.step + 1
                if not held:
                    began = time.monotonic()
                held.append(self._step(plan))
                is_full = len(held) == batch or time.monotonic() - began >= batch_s
                if is_full or not self._may_hold(plan, held[-1], plans):
                    yield held
                    held = []
        except UnreadablePlan as error:
            self._fail(f": {error}", is_own=True)
            yield [*held, self._step(StepPlan(0, ()))]

    def _may_hold(self, plan: StepPlan, result: StepResult, plans: PlanQueue) -> bool:
        """Return whether a result may be held back: all stages have work until the engine receives it."""
        if self._error or not plan.is_decode:
            return False
        if not self._completes_steps:
            return plans.decodes_ahead(1)
        is_first = any(part.sample is not None and part.sample.token_index == 0 for part in plan.slices)
        stages = self._shard.num_stages
        is_slow = stages * result.compute_us >= 1e6 * _SLOW_S
        return not is_first and plans.decodes_ahead(stages if is_slow else stages + 1)

    @property
    def _completes_steps(self) -> bool:
        """Whether this shard reports the sampled tokens, which complete a step."""
        return self._shard.is_last and self._shard.rank == 0

    def close(self) -> None:
        """Drop links, group, weights and KV; may be called twice."""
        self._close_links("this shard is closing")
        if self._runner is not None:
            self._collectives.close()
        self._runner = self._stepper = self._weights = self._sender = self._kv = None

    @staticmethod
    def resident_bytes() -> int:
        return int(psutil.Process().memory_info().rss)

    def _step(self, plan: StepPlan) -> StepResult:
        """Execute a plan; once one has failed, every later one fails with the same error."""
        shard = self._shard
        if not self._error:
            assert self._stepper is not None
            try:
                out, seconds = self._stepper.step(plan)
                self.steps_done += 1
                return StepResult(
                    plan.step, shard.stage, shard.rank, round(seconds * 1e6), out.samples,
                    cells=out.cells, estimate_us=out.estimate_us, targets=out.targets,
                    trace=self._tracer.take() if self._tracer is not None else None,
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001 - the engine must learn what stopped the step
                is_own = not isinstance(error, (LinkClosed, GroupLost))
                self._fail(f", step {plan.step}: {' '.join(str(error).split())}", is_own)
        return StepResult(plan.step, shard.stage, shard.rank, 0, error=self._error)

    def _fail(self, reason: str, is_own: bool = False) -> None:
        """Fail every step from now on; other shards of the stage that wait for this one hear of it at once."""
        self._error = f"stage {self._shard.stage} shard {self._shard.rank}{reason}"
        self.is_broken |= is_own
        self._collectives.close()

    def _connect(self) -> Stepper:
        """Reach the next stage, now that every stage listens."""
        assert self._runner is not None, "start comes first"
        # To the first stage: the oldest message has been read by then. It must never be waited for, or the ring would
        # stand still.
        depth = max_unread(self._shard.num_stages) + 2 if self._shard.is_last else DEPTH
        sender: Sender | None = None
        if self._links.downstream_socket:
            sender = UnixSender(self._links.downstream_socket, depth, self.epoch)
        elif self._links.downstream:
            name = shard_name((self._shard.stage + 1) % self._shard.num_stages, self._shard.rank)
            sender = GrpcSender(self._links.downstream, self._token, depth, self.epoch, self._identity, name)
        self._sender = sender
        if sender is not None and self._pair is not None:
            self._sender = DeviceSender(sender, self._pair, self._step_timeout_s, depth)
        return Stepper(
            self._runner, self.inbox, self._sender, self._step_timeout_s, self._tracer, self._collectives
        )  # fmt: skip

    def _available_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return int(psutil.virtual_memory().available)


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process; elsewhere than on Linux all resident memory."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))
