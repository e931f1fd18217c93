"""Summarize how the prefill of one prompt attended, from what the shards report of every sparse cell.

Recall is the share of attention mass that the selected keys keep; density is the share of causal pairs visited. Means
are over cells, weighted by their tokens; a prefix from the cache has no cells here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.engine.in_flight import InFlightStep
from protos.model import grid
from protos.model.spec import ModelSpec

Floats = NDArray[np.float64]
# of one head: tokens; density, estimated and held-out recall times tokens; smallest recalls; dense cells
_EMPTY: Floats = np.array([[0.0], [0.0], [0.0], [0.0], [1.0], [1.0], [0.0]])


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer over all sparse cells of a prompt; every tuple has one entry per query head."""

    layer: int
    density: tuple[float, ...]
    estimated_recall: tuple[float, ...]
    estimated_recall_min: tuple[float, ...]  # of the worst cell
    held_out_recall: tuple[float, ...]
    held_out_recall_min: tuple[float, ...]
    fallbacks: tuple[int, ...]  # cells that turned dense because of their recall


_FIGURES = LayerAttention.__slots__[1:]


@dataclass(frozen=True, slots=True)
class AttentionSummary:
    """Attention of one prompt: its mode and, for sparse prompts, what was kept, over all layers and heads."""

    mode: str  # dense or sparse
    positions: str  # see `describe_positions`
    scale_len: int  # prompt length behind the length scale
    cells: int = 0  # computed for this prompt
    density: float = 1.0
    estimated_recall: float = 1.0
    estimated_recall_min: float = 1.0
    held_out_recall: float = 1.0
    held_out_recall_min: float = 1.0
    fallbacks: int = 0  # head-cells that turned dense
    estimate_share: float = 0.0  # share of the compute time of its sparse steps that selected keys
    layers: tuple[LayerAttention, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain data, figures rounded."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_float=lambda text: round(float(text), 4))
        return plain


class AttentionReport:
    """The reports about one prompt, added up."""

    def __init__(self) -> None:
        self._sums: dict[int, Floats] = {}  # layer -> [7, query heads], see `_EMPTY`
        self._cells: set[int] = set()  # by first position
        self._estimate_us = 0
        self._compute_us = 0

    def add(self, sequence: int, step: InFlightStep) -> None:
        """Add what all shards report of a step; its time counts in full for each of its sparse prompts."""
        reports = [report for report in step.cells if report.sequence == sequence]
        for report in reports:
            self._cells.add(report.start)
            last = report.first_head + len(report.density)
            sums = self._sums.get(report.layer, _EMPTY[:, :0])
            if sums.shape[1] < last:
                sums = self._sums[report.layer] = np.hstack([sums, _EMPTY.repeat(last - sums.shape[1], axis=1)])
            heads = sums[:, report.first_head : last]
            columns = np.array([report.density, report.estimated_recall, report.held_out_recall])
            heads[0] += report.length
            heads[1:4] += report.length * columns
            heads[4:6] = np.minimum(heads[4:6], columns[1:])
            heads[6] += report.dense
        if reports:
            self._compute_us += step.compute_us
            self._estimate_us += step.estimate_us

    def summary(self, spec: ModelSpec | None, prompt_len: int, scale_len: int) -> AttentionSummary | None:
        """Return the summary so far, None without the spec of the model. `scale_len` 0 means `prompt_len`."""
        if spec is None:
            return None
        mode = "sparse" if grid.is_sparse(spec, 0, prompt_len) else "dense"
        base = AttentionSummary(mode, describe_positions(spec), scale_len or prompt_len)
        layers = {layer: sums[:, sums[0] > 0] for layer, sums in sorted(self._sums.items())}
        every = np.hstack([_EMPTY[:, :0], *layers.values()])
        if not every.size:
            return base
        total = np.hstack([every[:4].sum(axis=1), every[4:6].min(axis=1), every[6].sum()])
        return replace(
            base,
            **dict(zip(_FIGURES, _figures(total), strict=True)),
            cells=len(self._cells),
            estimate_share=self._estimate_us / self._compute_us if self._compute_us else 0.0,
            layers=tuple(LayerAttention(layer, *map(tuple, _figures(sums))) for layer, sums in layers.items()),
        )


def _figures(sums: Floats) -> tuple[Any, ...]:
    """Return the figures `_FIGURES` of sums [7] or [7, query heads]."""
    density, estimated, held_out = (sums[1:4] / sums[0]).tolist()
    estimated_min, held_out_min = sums[4:6].tolist()
    return density, estimated, estimated_min, held_out, held_out_min, sums[6].astype(int).tolist()


def describe_positions(spec: ModelSpec) -> str:
    """Return the position settings in one line."""
    text = f"{spec.rope.kind}, theta {spec.rope.theta:g}, factor {spec.rope.factor:g}"
    if spec.dual_chunk is not None:
        dual = spec.dual_chunk
        text += f", dual chunk {dual.chunk_size}/{dual.local_size}"
        if dual.original_max_position_embeddings > 0:
            text += f" of {dual.original_max_position_embeddings}"
    return text


def describe_sparsity(spec: ModelSpec) -> str:
    """Return the sparse mode of a deployment in one line."""
    if spec.sparse is None:
        return "dense"
    sparse = spec.sparse
    if sparse.patterns is not None:
        budget = "published patterns"
    elif sparse.uniform is not None:
        budget = f"{sparse.uniform.n_vertical} columns and {sparse.uniform.n_slash} diagonals"
    else:
        budget = f"recall {sparse.target_recall:g}"
    floor = f", floor {sparse.recall_floor:g} for {sparse.max_dense_share:g}" if sparse.recall_floor else ""
    return (
        f"vertical-slash above {sparse.threshold} tokens, cells of {sparse.cell}, last {sparse.last_q}, {budget}{floor}"
        + (", synthetic" if sparse.synthetic else "")
    )
