"""What sparse prefill, int8 KV and a pinned length scale change: logits over one document, beside those of a reference.

The reference prefills the document dense, with KV in the computing type, and continues it greedily. Every variant
prefills the same document in its own way and is then fed the reference's tokens. Decoded rows are dense in all of them,
so the logits differ by the KV of the prefill, and by the last row of the prompt. A reading under a pinned length (its
length scale is that of a longer prompt, in all rows) is compared with the same way of reading under its own length.

Legend: `N` compared positions, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protos.model.grid import is_sparse, whole_cells
from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport
from workers.eval.whole_model import SequenceFeed, WholeModel

_DIGITS = 6  # significant digits of the figures in the result
_WARM_UP = 256  # tokens
_HEAD_FIGURES = {  # names in the result, and in a report
    "density": "density", "estimated_recall": "estimated_recall", "held_out_recall": "held_out_recall",
    "dense_share": "dense",
}  # fmt: skip

OnProgress = Callable[[str, int, int], None]  # phase, tokens done, tokens in all


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to prefill the document."""

    name: str
    sparse: bool = False
    kv: torch.dtype | None = None  # None: the computing type
    scale_len: int = 0  # length whose length scale its rows use; 0: that of the prompt


@dataclass(frozen=True, slots=True)
class Setup:
    """The model and its settings: `chunk` and `page_size` in tokens, `spec` with the variants' sparse settings."""

    model: Path
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    chunk: int = 2048
    page_size: int = 64
    dummy: bool = False  # random weights


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prefilled and continued document: tokens `[N]`, their logits `[N, V]` in float32, reports and seconds."""

    tokens: list[int]
    logits: torch.Tensor
    cells: list[CellReport]
    prefill_s: float
    decode_s: float


class Reader:
    """The whole model in this process; every reading gets a cache of its own."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._model = WholeModel(None if setup.dummy else setup.model, setup.spec, setup.dtype, setup.device)

    def read(
        self, variant: Variant, prompt: Sequence[int], num_next: int, on_progress: OnProgress,
        forced: Sequence[int] | None = None,
    ) -> Reading:  # fmt: skip
        """Prefill `prompt`, then decode `num_next` tokens: those of `forced`, or greedily without it."""
        setup = self.setup
        spec = setup.spec if variant.sparse else replace(setup.spec, sparse=None)
        runner = self._model.runner(spec, len(prompt) + num_next, setup.page_size, variant.kv)
        feed = SequenceFeed(runner, setup.page_size, len(prompt), keep_logits=True, scale_len=variant.scale_len)
        began = time.perf_counter()
        position = 0
        while position < len(prompt):
            length = min(setup.chunk, len(prompt) - position)
            if is_sparse(spec, position, len(prompt)):
                length = whole_cells(spec, position, setup.chunk, len(prompt))
            feed.take(prompt[position : position + length], sample=position + length == len(prompt))
            position += length
            on_progress(f"{variant.name}: reading", position, len(prompt))
        prefill_s = time.perf_counter() - began
        while len(feed.tokens) < num_next:
            feed.take([(forced or feed.tokens)[len(feed.tokens) - 1]])
            on_progress(f"{variant.name}: continuing", len(feed.tokens), num_next)
        decode_s = time.perf_counter() - began - prefill_s
        return Reading(feed.tokens, torch.cat(feed.logits), feed.cells, prefill_s, decode_s)


def evaluate(
    setup: Setup, prompt: Sequence[int], num_next: int, variants: Sequence[Variant], on_progress: OnProgress,
    pinned: Sequence[int] = (), others: Mapping[str, Setup] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read once for the reference and once per variant; returns `reference`, `variants` and `pinned` as plain data.

    Args:
        others: further checkpoints by name, such as quantised copies, that read dense; one after the other in memory.
        pinned: lengths whose length scale is compared with that of the prompt, dense, and sparsely if a variant with KV
            in the computing type is sparse.
    """
    reader = Reader(setup)
    for variant in (Variant("dense"), *variants):  # warm up: kernels are built and see their shapes before the timing
        reader.read(variant, prompt[:_WARM_UP], 1, lambda phase, done, total: None)
    reference = reader.read(Variant("dense"), prompt, num_next, on_progress)
    entries = []
    own = {False: reference.logits}  # under the scale of the prompt's own length, dense and sparse
    for variant in variants:
        reading = reader.read(variant, prompt, num_next, on_progress, reference.tokens)
        if variant == Variant(variant.name, sparse=True):
            own[True] = reading.logits
        entry = {"name": variant.name, "sparse": variant.sparse, "kv": _name(variant.kv or setup.dtype)}
        entry |= compare(reference.logits, reading.logits) | _seconds(reading)
        if variant.sparse:
            entry |= {"cells": len({report.start for report in reading.cells})}
            entry |= {"heads": head_figures(reading.cells, setup.spec)}
        entries.append(entry)
    kv = {"kv": _name(setup.dtype), "token_ids": reference.tokens}
    result = {"reference": kv | _seconds(reference), "variants": entries}
    if pinned:
        ways = [
            Variant(f"{'sparse, ' if sparse else ''}pinned to {length}", sparse, scale_len=length)
            for length in pinned for sparse in own
        ]  # fmt: skip
        result["pinned"] = [
            {"scale_len": way.scale_len, "logit_factor": logit_factor(setup.spec, len(prompt), way.scale_len)}
            | {"sparse": way.sparse}
            | compare(own[way.sparse], reader.read(way, prompt, num_next, on_progress, reference.tokens).logits)
            for way in ways
        ]
    del reader
    for name, other in (others or {}).items():
        reading = Reader(other).read(Variant(name), prompt, num_next, on_progress, reference.tokens)
        entry = {"name": name, "sparse": False, "kv": _name(other.dtype)}
        entries.append(entry | compare(reference.logits, reading.logits) | _seconds(reading))
    return result


def logit_factor(spec: ModelSpec, prompt_len: int, scale_len: int) -> float:
    """Return by what a length scale pinned to `scale_len` multiplies the attention logits of a prompt."""
    if spec.dual_chunk is None:
        return 1.0
    return (spec.dual_chunk.length_scale(scale_len) / spec.dual_chunk.length_scale(prompt_len)) ** 2


def compare(reference: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Compare logits `[N, V]` with the reference's.

    `logit_error` is `max|difference| / max|reference|` at a position; `kl` is KL(reference || other) in nats.
    """
    exact, approximate = reference.double(), other.double()
    errors = (exact - approximate).abs().amax(dim=1) / exact.abs().amax(dim=1)
    logs, other_logs = exact.log_softmax(dim=1), approximate.log_softmax(dim=1)
    divergence = (logs.exp() * (logs - other_logs)).sum(dim=1).clamp_min(0.0)
    same = reference.argmax(dim=1) == other.argmax(dim=1)
    return {
        "same_top1": int(same.sum()),
        "logit_error_max": float(errors.max()),
        "logit_error_mean": float(errors.mean()),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "positions": {
            "other_top1": (~same).nonzero().flatten().tolist(),
            "logit_error": _rounded(errors.tolist()),
            "kl": _rounded(divergence.tolist()),
        },
    }


def head_figures(reports: Sequence[CellReport], spec: ModelSpec) -> dict[str, list[list[float]]]:
    """Return figures `[layers][heads]` over all cells: density weighted by causal pairs, the others by tokens.

    Of heads without any cell everything was kept.
    """
    shape = (spec.num_hidden_layers, spec.num_attention_heads)
    places = [(report.layer, slice(report.first_head, report.first_head + len(report.density))) for report in reports]
    figures = {}
    for name, field in _HEAD_FIGURES.items():
        sums, weights = np.zeros(shape), np.zeros(shape)
        for report, place in zip(reports, places, strict=True):
            pairs = report.length * report.start + report.length * (report.length + 1) // 2
            weight = pairs if name == "density" else report.length
            sums[place] += weight * np.asarray(getattr(report, field), float)
            weights[place] += weight
        share = np.where(weights > 0, sums / np.maximum(weights, 1), 0.0 if name == "dense_share" else 1.0)
        figures[name] = [_rounded(row) for row in share.tolist()]
    lowest = np.ones(shape)
    for report, place in zip(reports, places, strict=True):
        lowest[place] = np.minimum(lowest[place], report.held_out_recall)
    return figures | {"held_out_recall_min": [_rounded(row) for row in lowest.tolist()]}


def _seconds(reading: Reading) -> dict[str, float]:
    return {"prefill_s": round(reading.prefill_s, 3), "decode_s": round(reading.decode_s, 3)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
