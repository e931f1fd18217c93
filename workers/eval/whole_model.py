"""A whole model in this process, without Ray and sockets, and one sequence that it computes step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.kv.paged import PagedKV
from workers.model.weights import dummy_shard, load_shard, whole_model
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives


class WholeModel:
    """All weights of a checkpoint, or random ones; the runners that share them have KV of their own."""

    def __init__(self, model: Path | None, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._shard, self._dtype, self._device = whole_model(spec), dtype, device
        if model is None:
            self._weights = dummy_shard(spec, self._shard, dtype, device)
        else:
            self._weights = load_shard(model, spec, self._shard, dtype, device)

    def runner(
        self, spec: ModelSpec, num_tokens: int, page_size: int, kv_dtype: torch.dtype | None = None
    ) -> ModelRunner:
        """Return a runner with pages for `num_tokens`; `spec` may differ from that of the weights in its attention."""
        pages, heads = -(-num_tokens // page_size), spec.num_key_value_heads
        kv_dtype = kv_dtype or self._dtype
        kv = PagedKV(spec.num_hidden_layers, heads, spec.head_dim, pages, page_size, kv_dtype, self._device)
        return ModelRunner(spec, self._shard, self._weights, kv, Collectives(), self._device)

    @torch.inference_mode()
    def text_logits(self, spec: ModelSpec, ids: Sequence[int], page_size: int, chunk: int) -> torch.Tensor:
        """Return the float32 logits `[len(ids), V]` after each token of a text, which is read in steps of `chunk`."""
        runner = self.runner(spec, len(ids), page_size)
        feed = SequenceFeed(runner, page_size, len(ids))
        found = [feed.rows(ids[start : start + chunk]) for start in range(0, len(ids), chunk)]
        return torch.cat(found)


class SequenceFeed:
    """Feeds one sequence to a runner that has no other, step by step, and keeps what comes out."""

    def __init__(
        self, runner: ModelRunner, page_size: int, prompt_len: int, keep_logits: bool = False, scale_len: int = 0
    ) -> None:
        """Args: `scale_len` is the length whose length scale all rows use; 0: `prompt_len`."""
        self.tokens: list[int] = []  # greedy, one a step that samples
        self.logits: list[torch.Tensor] = []  # their rows [1, V]
        self.cells: list[CellReport] = []
        self._runner, self._page_size, self._prompt_len, self._keep_logits = runner, page_size, prompt_len, keep_logits
        self._scale_len = scale_len
        self._position = self._step = 0
        runner.reset()

    def take(self, ids: Sequence[int], sample: bool = True) -> None:
        """Compute the next rows; with `sample` also the token that follows them."""
        out = self._runner.execute(self._plan(ids, len(ids), sample), keep_logits=self._keep_logits)
        self.cells += out.cells
        self.tokens += out.tokens
        if out.logits is not None:
            self.logits.append(out.logits.cpu())

    @torch.inference_mode()
    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Compute the next rows; returns the float32 logits `[len(ids), V]` after each of them."""
        prepared = self._runner.prepare(self._plan(ids, len(ids), False))
        assert prepared is not None, "a plan with a slice"
        assert prepared.layers is not None, "no graphs were captured"
        decoder = self._runner.decoder
        hidden = decoder.embed(torch.tensor(list(ids), device=self._runner.device))
        return decoder.logits(decoder.layers(hidden, prepared.layers)).cpu()

    def skip(self, ids: Sequence[int]) -> None:
        """Take the pages of the next rows without computing them: an earlier feed of the runner has."""
        self._runner.prepare(self._plan(ids[:1], len(ids), False))

    def _plan(self, ids: Sequence[int], length: int, sample: bool) -> StepPlan:
        start, stop = self._position, self._position + length
        have, need = -(-start // self._page_size), -(-stop // self._page_size)
        wanted = SampleSpec(SamplingParams(), len(self.tokens)) if sample else None
        pages = range(have, need)
        part = SequenceSlice(
            0, start, len(ids), self._prompt_len, list(ids), pages, need, wanted, scale_len=self._scale_len
        )
        self._position, self._step = stop, self._step + 1
        return StepPlan(self._step - 1, (part,))
