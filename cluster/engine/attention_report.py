"""Summarize how the prefill of one prompt attended, from what the shards report of every sparse cell.

Recall is the share of attention mass that the selected keys keep; density is the share of causal pairs visited. Means
are over cells, weighted by their tokens; a prefix from the cache has no cells here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.engine.in_flight import InFlightStep
from protos.model import grid
from protos.model.spec import ModelSpec

_DIGITS = 4  # of the figures in JSON


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
        plain: dict[str, Any] = _rounded(asdict(self))
        return plain


@dataclass(slots=True)
class _HeadSums:
    """Sums over the cells of one query head of one layer, weighted by tokens."""

    tokens: int = 0
    density: float = 0.0
    estimated: float = 0.0
    estimated_min: float = 1.0
    held_out: float = 0.0
    held_out_min: float = 1.0
    fallbacks: int = 0

    def add(self, tokens: int, density: float, estimated: float, held_out: float, dense: bool) -> None:
        self.tokens += tokens
        self.density += tokens * density
        self.estimated += tokens * estimated
        self.held_out += tokens * held_out
        self.estimated_min = min(self.estimated_min, estimated)
        self.held_out_min = min(self.held_out_min, held_out)
        self.fallbacks += dense


@dataclass(slots=True)
class AttentionReport:
    """The reports about one prompt, added up."""

    _heads: dict[int, dict[int, _HeadSums]] = field(default_factory=dict)  # layer -> head
    _cells: set[int] = field(default_factory=set)  # by first position
    _estimate_us: int = 0
    _compute_us: int = 0

    def add(self, sequence: int, step: InFlightStep) -> None:
        """Add what all shards report of a step; its time counts in full for each of its sparse prompts."""
        reports = [report for report in step.cells if report.sequence == sequence]
        for report in reports:
            self._cells.add(report.start)
            heads = self._heads.setdefault(report.layer, {})
            columns = (report.density, report.estimated_recall, report.held_out_recall, report.dense)
            for index, (density, estimated, held_out, dense) in enumerate(zip(*columns, strict=True)):
                head = heads.setdefault(report.first_head + index, _HeadSums())
                head.add(report.length, density, estimated, held_out, dense)
        if reports:
            self._compute_us += step.compute_us
            self._estimate_us += step.estimate_us

    def summary(self, spec: ModelSpec | None, prompt_len: int, scale_len: int) -> AttentionSummary | None:
        """Return the summary so far, None without the spec of the model. `scale_len` 0 means `prompt_len`."""
        if spec is None:
            return None
        mode = "sparse" if grid.is_sparse(spec, 0, prompt_len) else "dense"
        base = AttentionSummary(mode, describe_positions(spec), scale_len or prompt_len)
        heads = [head for layer in self._heads.values() for head in layer.values()]
        tokens = sum(head.tokens for head in heads)
        if not tokens:
            return base
        return replace(
            base,
            cells=len(self._cells),
            density=sum(head.density for head in heads) / tokens,
            estimated_recall=sum(head.estimated for head in heads) / tokens,
            estimated_recall_min=min(head.estimated_min for head in heads),
            held_out_recall=sum(head.held_out for head in heads) / tokens,
            held_out_recall_min=min(head.held_out_min for head in heads),
            fallbacks=sum(head.fallbacks for head in heads),
            estimate_share=self._estimate_us / self._compute_us if self._compute_us else 0.0,
            layers=tuple(self._layers()),
        )

    def _layers(self) -> Iterator[LayerAttention]:
        for layer, by_head in sorted(self._heads.items()):
            heads = [head for _, head in sorted(by_head.items()) if head.tokens]
            yield LayerAttention(
                layer=layer,
                density=tuple(head.density / head.tokens for head in heads),
                estimated_recall=tuple(head.estimated / head.tokens for head in heads),
                estimated_recall_min=tuple(head.estimated_min for head in heads),
                held_out_recall=tuple(head.held_out / head.tokens for head in heads),
                held_out_recall_min=tuple(head.held_out_min for head in heads),
                fallbacks=tuple(head.fallbacks for head in heads),
            )


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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value
