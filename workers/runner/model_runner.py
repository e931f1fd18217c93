"""Executes step plans on one shard: batch, layers, and on the last stage sampling. Needs neither Ray nor sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, SampledToken, ShardSpec, StepPlan
from workers.kv.paged import PagedKV
from workers.model.batch import PageTables, token_ids
from workers.model.decoder import Decoder, Ready
from workers.model.sparse_prefill import CellLog
from workers.model.weights import ShardWeights
from workers.runner.sampler import Sampler, score
from workers.transport.collectives import Collectives

_SCORED_ROWS = 64  # whose logits are in memory at a time


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
    layers: Ready


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
        self.dtype = weights.layers[0].input_norm.dtype  # of the activations too
        self.decoder = Decoder(spec, shard, weights, collectives, self.device)
        self._kv = kv
        self._collectives = collectives
        self._tables = PageTables(kv.page_size)
        self._sampler = Sampler(spec.vocab_size)
        self._newest: dict[int, int] = {}  # token of each sequence: the input of plans without ids

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
        batch = self._tables.batch(plan, self._spec, self.device)
        return PreparedStep(plan, self.decoder.prepare(batch, self._kv))

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
        log = CellLog()
        out = self._compute(prepared, hidden, keep_logits, log)
        # what the device has to say of sparse cells is read last, when it has computed everything
        return replace(out, cells=log.read(), estimate_us=round(log.seconds * 1e6))

    def _compute(
        self, prepared: PreparedStep, hidden: torch.Tensor | None, keep_logits: bool, log: CellLog
    ) -> StepOutput:
        plan, batch = prepared.plan, prepared.layers.batch
        if self.shard.is_first:
            hidden = self.decoder.embed(token_ids(plan, self._newest, self.device))
        assert hidden is not None, "a later stage needs activations"
        hidden = self.decoder.layers(hidden, prepared.layers, log)
        if not self.shard.is_last:
            return StepOutput(hidden=hidden)
        reports = StepOutput(targets=self._score(plan, hidden))
        if not len(batch.sample_rows):
            return reports
        logits = self.decoder.logits(hidden[batch.sample_rows])
        self.decoder.settle()
        sampled = [(part.sequence, part.sample) for part in plan.slices if part.sample is not None]
        # every rank samples the same tokens, and sends them to its peer in the first stage
        samples = self._sampler.sample_rows(logits, sampled)
        tokens = tuple(sample.token_id for sample in samples)
        if self.shard.is_first:
            self.set_newest((sample.sequence for sample in samples), tokens)
        if self._collectives.rank != 0:
            return replace(reports, tokens=tokens)
        return replace(reports, samples=samples, tokens=tokens, logits=logits if keep_logits else None)

    def _score(self, plan: StepPlan, hidden: torch.Tensor) -> tuple[SampledToken, ...]:
        """Return the targets of the slices with log-probabilities; the output head is applied to few rows at a time."""
        found: list[SampledToken] = []
        begin = 0
        for part in plan.slices:
            for first in range(0, len(part.targets), _SCORED_ROWS):
                last = min(first + _SCORED_ROWS, len(part.targets))
                logits = self.decoder.logits(hidden[begin + first : begin + last])  # every rank takes part
                self.decoder.settle()
                if self._collectives.rank == 0:
                    found += score(logits, part, first)
            begin += part.length
        return tuple(found)
