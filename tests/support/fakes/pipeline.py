"""A whole pipeline in one process: real runners, real gloo groups, threads for processes, queues for gRPC."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.config.schema import KvStoreSection
from cluster.config.topology import plan_shards
from cluster.constraints.compiler import ConstraintCompiler
from cluster.engine.engine import Engine
from cluster.engine.outputs import Generation, GenerationSpec
from cluster.kv_store.store import KvStore
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.text.tokenizer import TextTokenizer
from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, ShardSpec, StepPlan, StepResult
from tests.support.fakes.kv_memory import KvMemory, KvMemoryShard
from tests.support.oracles.integrity import check_engine
from workers.kv.paged import PagedKV
from workers.model.weights import load_shard
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.stage.step import Stepper
from workers.transport.collectives import Collectives, join_group
from workers.transport.link import DEPTH, Inbox, Sender


class InProcessShard(KvMemoryShard):
    """A `GrpcStageHandle` whose shard is a thread of this process."""

    def __init__(self, runner: ModelRunner, kv: PagedKV, inbox: Inbox | None, sender: Sender | None) -> None:
        super().__init__(kv)
        self._stepper = Stepper(runner, inbox, sender, 60.0)
        self.shard: ShardSpec = runner.shard
        self.runner = runner
        self.plans: list[StepPlan] = []  # every step this shard has executed
        self.cells: list[CellReport] = []  # of every sparse cell it has attended, layer by layer
        self.logits: dict[int, torch.Tensor] = {}  # step -> logits of its samples, when kept
        self.rows: dict[tuple[int, int], torch.Tensor] = {}  # (sequence, token index) -> logits [V], when kept
        self.keep_logits = False
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def connect(self, on_results: Callable[[Sequence[StepResult]], None], on_lost: Callable[[str], None]) -> None:
        self._stepper.reset()
        self._thread = threading.Thread(target=self._run, args=(on_results,), daemon=True)
        self._thread.start()

    def send(self, plans: Sequence[StepPlan]) -> None:
        for plan in plans:
            self._plans.put(plan)

    def close(self) -> None:
        self._plans.put(None)
        if self._thread is not None:
            self._thread.join(timeout=30)
            assert not self._thread.is_alive(), "a shard did not stop"
            self._thread = None

    def _run(self, on_results: Callable[[Sequence[StepResult]], None]) -> None:
        while (plan := self._plans.get()) is not None:
            error = ""
            out = StepOutput()
            try:
                out, _ = self._stepper.step(plan, self.keep_logits)
                if out.logits is not None:
                    self.logits[plan.step] = out.logits
                    wanted = ((part.sequence, part.sample.token_index) for part in plan.slices if part.sample)
                    self.rows.update(zip(wanted, out.logits, strict=True))
                self.cells.extend(out.cells)
                self.plans.append(plan)
            except Exception as problem:  # noqa: BLE001 - reported like a stage does
                error = str(problem) or repr(problem)
            result = StepResult(
                plan.step, self.shard.stage, self.shard.rank, 1000, out.samples, error, out.cells,
                out.estimate_us, out.targets,
            )  # fmt: skip
            on_results([result])


class Pipeline:
    """Stages, scheduler and engine over a checkpoint directory."""

    def __init__(
        self, model_dir: Path, stages: int, ranks: int, *, chunk: int = 256, pages: int = 64, page_size: int = 16,
        seqs: int = 8, dtype: torch.dtype = torch.float32, spec: ModelSpec | None = None, eos: Sequence[int] = (),
        kv_dtype: torch.dtype | None = None, scheduler: type[Scheduler] = Scheduler, memory: KvMemory | None = None,
        block_tokens: int = 32, tokenizer: TextTokenizer | None = None, constraints: ConstraintCompiler | None = None,
    ) -> None:  # fmt: skip
        """Args: `memory` is where KV is stored, in blocks of `block_tokens`; None: nowhere."""
        self.spec = spec or load_model_spec(model_dir)
        shards = plan_shards(self.spec, stages, ranks)
        stores = [dist.HashStore() for _ in range(stages)]
        inboxes = {(s.stage, s.rank): Inbox() for s in shards if stages > 1}
        self._groups: list[Collectives] = []

        def build(shard: ShardSpec) -> InProcessShard:
            weights = load_shard(model_dir, self.spec, shard, dtype, torch.device("cpu"), None)
            kv = PagedKV(
                shard.layers.size, shard.kv_heads.size, self.spec.head_dim, pages, page_size, kv_dtype or dtype
            )
            group = join_group(stores[shard.stage], shard.rank, ranks, torch.device("cpu"), 60.0)
            self._groups.append(group)
            runner = ModelRunner(self.spec, shard, weights, kv, group)
            after = inboxes.get(((shard.stage + 1) % stages, shard.rank))
            sender = Sender(after.entry, 1000 if shard.is_last else DEPTH) if after and after.entry else None
            return InProcessShard(runner, kv, inboxes.get((shard.stage, shard.rank)), sender)

        with ThreadPoolExecutor(len(shards)) as threads:  # the ranks of a stage meet, so all must be under way
            self.shards = list(threads.map(build, shards))
        self.store = KvStore(KvStoreSection(block_tokens=block_tokens), memory is not None)
        if memory is not None:
            for shard in self.shards:
                shard.memory = memory
        self.scheduler = scheduler(
            PagePool(pages), page_size, chunk, seqs, spec=self.spec, num_stages=stages,
            block_tokens=self.store.block_tokens,
        )  # fmt: skip
        self.engine = Engine(
            self.scheduler, self.shards, tokenizer, eos, store=self.store if memory is not None else None,
            constraints=constraints,
        )  # fmt: skip

    def __enter__(self) -> Pipeline:
        self.store.attach(self.shards, self.engine.post, self.scheduler.pool)
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.store.detach(0.0 if self.engine.error else 20.0), "a shard is still at work"
        self.engine.close()
        for group in self._groups:
            group.close()

    @property
    def last(self) -> InProcessShard:
        return next(s for s in self.shards if s.shard.is_last and s.shard.rank == 0)

    @property
    def plans(self) -> list[StepPlan]:
        """The steps the last stage has executed, in order."""
        return self.last.plans

    def keep_logits(self) -> Pipeline:
        """Remember the logits of every sample from now on; returns itself."""
        self.last.keep_logits = True
        return self

    def logits(self, result: Generation) -> torch.Tensor:
        """Float32 logits `[n, V]` that the tokens of `result` were chosen from; needs `keep_logits`."""
        return torch.stack([self.last.rows[s.sequence, index] for index, s in enumerate(result.samples)])

    def generate(self, *specs: GenerationSpec, timeout_s: float = 120.0) -> list[Generation]:
        """Run prompts together; checks the page pool afterwards."""
        handles = self.engine.submit_all([(spec, lambda event: None) for spec in specs])
        results = [handle.wait(timeout_s) for handle in handles]
        check_engine(self.engine)
        return results
