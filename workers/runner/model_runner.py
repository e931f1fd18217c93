"""Executes step plans on one shard: batch, layers, and on the last stage sampling. Needs neither Ray nor sockets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, SampledToken, ShardSpec, StepPlan
from workers.kv.paged import PagedKV
from workers.model.batch import Batch, PageTables, token_ids
from workers.model.decoder import Decoder, Ready
from workers.model.sparse_prefill import CellLog
from workers.model.weights import ShardWeights
from workers.runner.sampler import Sampler
from workers.transport.collectives import Collectives


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Activations for the next stage `[T, M]`, or from the last stage the sampled tokens (and logits on request)."""

    hidden: torch.Tensor | None = None
    samples: tuple[SampledToken, ...] = ()
    tokens: tuple[int, ...] = ()  # the sampled ids once more, at every rank of the last stage
    logits: torch.Tensor | None = None
    cells: tuple[CellReport, ...] = ()  # how the sparse cells of the step were attended, layer by layer
    estimate_us: int = 0  # spent on estimating and selecting their keys


@dataclass(frozen=True, slots=True)
class Prepared:
    """What of a step is known without its tokens or activations."""

    plan: StepPlan
    batch: Batch
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

    def reset(self) -> None:
        """Forget every sequence; the pages become free for other plans."""
        self._tables.clear()
        self._sampler.clear()
        self._newest.clear()

    def execute(self, plan: StepPlan, hidden: torch.Tensor | None = None, keep_logits: bool = False) -> StepOutput:
        """Compute one step: `prepare` and `compute`."""
        ready = self.prepare(plan)
        return StepOutput() if ready is None else self.compute(ready, hidden, keep_logits)

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Prepared | None:
        """Do what needs neither tokens nor activations; None when the plan has nothing to compute.

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
        return Prepared(plan, batch, self.decoder.prepare(batch, self._kv))

    def set_newest(self, sequences: Iterable[int], tokens: Iterable[int]) -> None:
        """Note the newest token of each sequence, the input of plans without ids; unknown sequences are skipped."""
        newest = zip(sequences, tokens, strict=True)
        self._newest.update((sequence, token) for sequence, token in newest if sequence in self._tables)

    @torch.inference_mode()
    def compute(self, ready: Prepared, hidden: torch.Tensor | None = None, keep_logits: bool = False) -> StepOutput:
        """Compute a step, the one prepared last.

        Args:
            ready: the step; the token ids of its plan are used on the first stage.
            hidden: `[T, M]` from the previous stage (ignored on the first).
            keep_logits: also return the float32 logits `[samples, V]` (tests and tools).

        Raises:
            PlanMismatch: token ids are missing.
            RuntimeError: logits are not finite, or a member of the stage is gone.
        """
        plan, batch = ready.plan, ready.batch
        if self.shard.is_first:
            hidden = self.decoder.embed(token_ids(plan, self._newest, self.device))
        assert hidden is not None, "a later stage needs activations"
        log = CellLog()
        hidden = self.decoder.layers(hidden, ready.layers, log)
        reports = StepOutput(cells=tuple(log.cells), estimate_us=round(log.seconds * 1e6))
        if not self.shard.is_last:
            return replace(reports, hidden=hidden)
        if not len(batch.sample_rows):
            return reports
        logits = self.decoder.logits(hidden[batch.sample_rows])
        wanted = [part for part in plan.slices if part.sample is not None]
        samples = tuple(  # at every rank, from the same logits: each tells its own part of the first stage
            self._sampler.sample(part.sequence, row, part.sample)
            for part, row in zip(wanted, logits, strict=True)
            if part.sample is not None
        )
        tokens = tuple(sample.token_id for sample in samples)
        if self.shard.is_first:
            self.set_newest((sample.sequence for sample in samples), tokens)
        if self._collectives.rank != 0:
            return replace(reports, tokens=tokens)
        return replace(reports, samples=samples, tokens=tokens, logits=logits if keep_logits else None)
