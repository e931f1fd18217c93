"""Executes step plans on one shard: batch, layers, and on the last stage sampling. Needs neither Ray nor sockets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, SampledToken, ShardSpec, StepPlan
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV
from workers.model.batch import PageTables, token_ids
from workers.model.decoder import Decoder, Ready
from workers.model.device.tables import DeviceTables
from workers.model.sparse_prefill import CellLog
from workers.model.weights import ShardWeights
from workers.runner.cuda_recorder import CudaRecorder
from workers.runner.decode_graphs import MOST_ROWS, DecodeGraphs, GraphStep, Recorder
from workers.runner.sampler import Sampler, score
from workers.transport.collectives import Collectives

_log = logging.getLogger(__name__)
SCORED_ROWS = 64  # whose logits are in memory at a time


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a step on one shard: hidden states, or at the last stage sampled tokens."""

    hidden: torch.Tensor | None = None  # [T, M], for the next stage
    samples: tuple[SampledToken, ...] = ()  # at rank 0 of the last stage
    tokens: tuple[int, ...] = ()  # the sampled ids, at every rank of the last stage
    logits: torch.Tensor | None = None  # [samples, V] float32, at rank 0 of the last stage, on request
    cells: tuple[CellReport, ...] = ()  # of the sparse cells of the step, layer by layer
    estimate_us: int = 0  # time for estimating and selecting their keys
    targets: tuple[SampledToken, ...] = ()  # of the plan's slices with log-probabilities, at rank 0 of the last stage


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """What can be computed of a step without its tokens or activations."""

    plan: StepPlan
    layers: Ready | None  # None where a graph has it all
    graph: GraphStep | None = None


class ModelRunner:
    """One shard of the model with its KV pages.

    A failed step leaves the page tables in an unknown state; the caller must then stop or `reset()` and replay.
    """

    def __init__(
        self, spec: ModelSpec, shard: ShardSpec, weights: ShardWeights, kv: PagedKV, collectives: Collectives,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self._spec = spec
        self.shard = shard
        self.device = device or torch.device("cpu")
        self.hidden_size = spec.hidden_size
        self.decoder = Decoder(spec, shard, weights, collectives, self.device)
        self.dtype = self.decoder.dtype
        self._kv = kv
        self._collectives = collectives
        self._tables = PageTables(kv.page_size)
        self._sampler = Sampler(spec.vocab_size)
        self._newest: dict[int, int] = {}  # token of each sequence: the input of plans without ids
        self._device_tables = DeviceTables(kv.num_pages, self.device) if calls.supports(self.device) else None
        self._graphs: DecodeGraphs | None = None

    def capture_decode(self, capacity: int, recorder: Recorder | None = None) -> bool:
        """Capture graphs for steps that decode up to `capacity` rows; if that fails, they run eagerly as before.

        Args:
            recorder: on a GPU the default, CUDA graphs.

        Returns:
            Whether there are graphs.
        """
        if self._device_tables is None or not self.decoder.is_capturable:
            return False
        rows = min(capacity, MOST_ROWS)
        try:
            self._device_tables.reserve(capacity)  # they must not move when a step has more rows than graphs
            made = recorder or CudaRecorder(self.device)
            graphs = DecodeGraphs(self.decoder, self._kv, self._device_tables, rows, self.device, made)
            graphs.capture()
        except RuntimeError as error:
            _log.warning("steps that decode run without CUDA graphs: %s", " ".join(str(error).split())[:300])
            return False
        self._graphs = graphs
        return True

    @contextmanager
    def settled_by(self, wait: Callable[[], object]) -> Iterator[None]:
        """Have `compute` call `wait` before it reads from the device: reading itself waits without a limit."""
        before, self.decoder.settle = self.decoder.settle, wait
        try:
            yield
        finally:
            self.decoder.settle = before

    def reset(self) -> None:
        """Forget every sequence; its pages may be used by other plans."""
        self._tables.clear()
        self._sampler.clear()
        self._newest.clear()
        if self._device_tables is not None:
            self._device_tables.clear()

    def execute(self, plan: StepPlan, hidden: torch.Tensor | None = None, keep_logits: bool = False) -> StepOutput:
        """Execute one step: `prepare` and `compute`."""
        prepared = self.prepare(plan)
        return StepOutput() if prepared is None else self.compute(prepared, hidden, keep_logits)

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> PreparedStep | None:
        """Do what needs neither tokens nor activations; returns None if the plan has nothing to compute.

        Raises:
            PlanMismatch: the plan does not continue what this shard has seen.
        """
        for sequence in plan.released:
            self._sampler.forget(sequence)
            self._newest.pop(sequence, None)
        self._tables.apply(plan)
        if not plan.slices:
            return None
        if self._graphs is not None and (graph := self._graphs.prepare(plan, self._tables)) is not None:
            return PreparedStep(plan, None, graph)
        batch = self._tables.batch(plan, self._spec, self.device)
        return PreparedStep(plan, self.decoder.prepare(batch, self._kv, self._device_tables))

    def set_newest(self, sequences: Iterable[int], tokens: Iterable[int]) -> None:
        """Note the newest token of each sequence, the input of plans without ids; unknown sequences are skipped."""
        newest = zip(sequences, tokens, strict=True)
        self._newest.update((sequence, token) for sequence, token in newest if sequence in self._tables)

    @torch.inference_mode()
    def compute(
        self, prepared: PreparedStep, hidden: torch.Tensor | None = None, keep_logits: bool = False
    ) -> StepOutput:
        """Compute a step.

        Args:
            prepared: the step that was prepared last; the first stage embeds the token ids of its plan.
            hidden: `[T, M]` from the previous stage (ignored on the first).
            keep_logits: also return the float32 logits `[samples, V]` (tests and tools).

        Raises:
            PlanMismatch: token ids are missing.
            RuntimeError: logits are not finite, or a member of the stage is gone.
        """
        if prepared.graph is not None:
            return self._replay(prepared.plan, prepared.graph, hidden, keep_logits)
        assert prepared.layers is not None
        log = CellLog()
        out = self._compute(prepared.plan, prepared.layers, hidden, keep_logits, log)
        # what the device has to say of sparse cells is read last, when it has computed everything
        return replace(out, cells=log.read(), estimate_us=round(log.seconds * 1e6))

    def _compute(
        self, plan: StepPlan, layers: Ready, hidden: torch.Tensor | None, keep_logits: bool, log: CellLog
    ) -> StepOutput:
        if self.shard.is_first:
            hidden = self.decoder.embed(torch.tensor(token_ids(plan, self._newest), device=self.device))
        assert hidden is not None, "a later stage needs activations"
        hidden = self.decoder.layers(hidden, layers, log)
        if not self.shard.is_last:
            return StepOutput(hidden=hidden)
        reports = StepOutput(targets=self._score(plan, hidden))
        sample_rows = layers.batch.sample_rows
        if not len(sample_rows):
            return reports
        return self._sample(plan, self.decoder.logits(hidden[sample_rows]), None, reports, keep_logits)

    def _replay(
        self, plan: StepPlan, graph: GraphStep, hidden: torch.Tensor | None, keep_logits: bool
    ) -> StepOutput:  # fmt: skip
        """Compute a step that a graph was captured for."""
        assert self._graphs is not None
        out = self._graphs.run(graph, token_ids(plan, self._newest) if self.shard.is_first else (), hidden)
        rows = [row for row, part in enumerate(plan.slices) if part.sample is not None]
        if out.logits is None or out.chosen is None or not rows:
            return StepOutput(hidden=out.hidden)
        logits, chosen = out.logits, out.chosen
        if len(rows) < len(plan.slices):
            logits, chosen = logits[rows], chosen[:, rows]
        return self._sample(plan, logits.clone() if keep_logits else logits, chosen, StepOutput(), keep_logits)

    def _sample(
        self, plan: StepPlan, logits: torch.Tensor, chosen: torch.Tensor | None, reports: StepOutput, keep_logits: bool
    ) -> StepOutput:
        """Sample the rows of a plan that ask for it, whose logits are `[samples, V]`; every rank samples the same."""
        self.decoder.settle()
        sampled = [(part.sequence, part.sample) for part in plan.slices if part.sample is not None]
        samples = self._sampler.sample_rows(logits, sampled, chosen)
        tokens = tuple(sample.token_id for sample in samples)
        if self.shard.is_first:
            self.set_newest((sample.sequence for sample in samples), tokens)
        if self._collectives.rank != 0:  # it sends them to its peer in the first stage
            return replace(reports, tokens=tokens)
        return replace(reports, samples=samples, tokens=tokens, logits=logits if keep_logits else None)

    def _score(self, plan: StepPlan, hidden: torch.Tensor) -> tuple[SampledToken, ...]:
        """Return the targets of the slices with log-probabilities; the output head is applied to few rows at a time."""
        found: list[SampledToken] = []
        begin = 0
        for part in plan.slices:
            for first in range(0, len(part.targets), SCORED_ROWS):
                last = min(first + SCORED_ROWS, len(part.targets))
                logits = self.decoder.logits(hidden[begin + first : begin + last])  # every rank takes part
                self.decoder.settle()
                if self._collectives.rank == 0:
                    found += score(logits, part, first)
            begin += part.length
        return tuple(found)
