"""The weights of one shard, read slice by slice from memory-mapped files.

A plan lists, for every tensor of the shard, the rows and columns of checkpoint tensors it consists of; a checkpoint and
the generator of random weights fill the same plan. Matrices of the compiled kernels are packed while they are read.

Legend: `M` hidden size, `D` head dim, `H` and `K` query and KV heads, `E` experts, `I` intermediate; a trailing `r`
marks the part of this shard.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from protos.model.files import is_gguf
from protos.model.spec import ModelSpec
from protos.model.tensor_names import EMBEDDING
from protos.stage.messages import ShardSpec, Span
from workers.kernels.upload import Uploads
from workers.kv.host_memory import advise_huge_pages
from workers.model import compiled
from workers.model.quantized import Into, MatrixSource, Region, load_experts, load_matrix
from workers.quant.packed import Experts
from workers.quant.weight import Weight

if TYPE_CHECKING:  # random weights are made on machines without safetensors
    from protos.model.checkpoint import Checkpoint

OnProgress = Callable[[int, int], None]  # bytes loaded, bytes of this shard

_CHUNK_BYTES = 16 << 20  # copied at once; bounds the host memory of a converting copy to a device
_DUMMY_ROWS = 1024  # rows of a random tensor that are generated together
_DUMMY_SCALE = 0.02
_PACKED = {"qkv_weight", "o_weight", "gate_up", "down", "router", "experts_gate_up", "experts_down", "lm_head"}
_EXPERTS = {"experts_gate_up", "experts_down"}
_QUANTIZED = _PACKED - {"router"} | {"embed"}  # those that may stay as quantised checkpoints have them


@dataclass(slots=True)
class LayerWeights:
    """One layer of one shard, with either a dense MLP or a router and experts; norms are whole on every rank.

    Shapes are those of plain matrices; some may be packed (see `compiled`), or quantised.
    """

    input_norm: torch.Tensor  # [M]
    qkv_weight: Weight  # [(Hr + 2 Kr) D, M]: q, then k, then v
    o_weight: Weight  # [M, Hr D]
    post_norm: torch.Tensor  # [M]
    qkv_bias: torch.Tensor | None = None  # [(Hr + 2 Kr) D]
    o_bias: torch.Tensor | None = None  # [M], rank 0 only: the outputs of ranks are summed
    q_norm: torch.Tensor | None = None  # [D]
    k_norm: torch.Tensor | None = None  # [D]
    gate_up: Weight | None = None  # [2 Ir, M]: gate, then up
    gate_up_bias: torch.Tensor | None = None  # [2 Ir]
    down: Weight | None = None  # [M, Ir]
    down_bias: torch.Tensor | None = None  # [M], rank 0 only
    router: torch.Tensor | None = None  # [E, M], whole on every rank
    experts_gate_up: Experts | None = None  # [Er, 2I, M]: gate, then up
    experts_down: Experts | None = None  # [Er, M, I]


@dataclass(slots=True)
class ShardWeights:
    """All weights of one shard; with tied embeddings `lm_head` and `embed` of the last stage are one tensor."""

    layers: list[LayerWeights] = field(default_factory=list)
    embed: Weight | None = None  # [rows of shard.vocab, M]: first stage, and last stage when tied
    norm: torch.Tensor | None = None  # [M], last stage
    lm_head: Weight | None = None  # [rows of shard.vocab, M], last stage

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        ends = [self.embed, self.norm, None if self.lm_head is self.embed else self.lm_head]
        inner = [getattr(layer, each.name) for layer in self.layers for each in fields(layer)]
        return sum(tensor.nbytes for tensor in (*ends, *inner) if tensor is not None)


class _Piece(NamedTuple):
    """Rows and columns of a checkpoint tensor, and their first row in the shard's tensor (of `expert`, if set)."""

    name: str
    rows: Span
    columns: Span | None = None  # None for a vector
    row: int = 0
    expert: int | None = None


class _Plan(NamedTuple):
    shape: tuple[int, ...]
    pieces: Iterable[_Piece]  # read once


_Fill = Callable[[torch.Tensor, _Piece], None]  # copies the region of a piece to a tensor of its shape


class _Source(NamedTuple):
    fill: _Fill  # of what is stored plain
    uploads: Uploads  # of what is stored quantised
    matrices: MatrixSource | None = None  # of a quantised checkpoint


def whole_model(spec: ModelSpec) -> ShardSpec:
    """Return the shard of a model that is not split."""
    sizes = (
        spec.num_hidden_layers, spec.num_attention_heads, spec.num_key_value_heads, spec.num_experts,
        spec.intermediate_size, spec.vocab_size,
    )  # fmt: skip
    return ShardSpec(0, 1, 0, 1, *(Span(0, size) for size in sizes))


def load_shard(
    model_dir: Path, spec: ModelSpec, shard: ShardSpec, dtype: torch.dtype, device: torch.device | str,
    on_progress: OnProgress | None = None,
) -> ShardWeights:  # fmt: skip
    """Read this shard's weights, converted to `dtype`, onto `device`; `model_dir` may be a GGUF file.

    Host memory grows by the weights (unless they go to a device) and a few tens of MiB; files stay in the page cache.
    Embeddings that `spec` ties are loaded untied when the checkpoint stores an output matrix of its own.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of another shape or dtype.
    """
    from protos.model.checkpoint import Checkpoint

    checkpoint, uploads = Checkpoint.open(model_dir, spec), Uploads(_CHUNK_BYTES)
    spec = replace(spec, tie_word_embeddings=not checkpoint.has_own_head)
    with ExitStack() as stack:
        if is_gguf(model_dir):
            # a processor's products take codes as they are; in float32 nothing is rounded
            keeps = dtype == torch.bfloat16 and torch.device(device).type == "cpu"
            source = _from_gguf(checkpoint, model_dir, spec.head_dim, stack, uploads, keeps)
        else:
            source = _from_files(checkpoint, spec, stack, uploads)
        return _build(source, spec, shard, dtype, torch.device(device), on_progress)


def dummy_shard(
    spec: ModelSpec, shard: ShardSpec, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> ShardWeights:
    """Return random weights (normal, scale 0.02; norms and embeddings 1): slices of one model for every layout."""
    matrices = None
    if spec.quant is not None:
        from workers.model.quantized_sources import RandomMatrices  # here: it needs safetensors

        matrices = RandomMatrices(spec, spec.quant, seed)
    source = _Source(_random(spec, seed), Uploads(_CHUNK_BYTES), matrices)
    return _build(source, spec, shard, dtype, torch.device(device), None)


def shard_bytes(spec: ModelSpec, shard: ShardSpec, dtype: torch.dtype) -> int:
    """Return the bytes of the weights of this shard, with embeddings tied as `spec` says."""
    return sum(math.prod(plan.shape) for plans in _plan_all(spec, shard) for plan in plans.values()) * dtype.itemsize


def _build(
    source: _Source, spec: ModelSpec, shard: ShardSpec, dtype: torch.dtype, device: torch.device,
    on_progress: OnProgress | None,
) -> ShardWeights:  # fmt: skip
    total, loaded = shard_bytes(spec, shard, dtype), 0

    def advance(rows: Span, columns: Span | None) -> None:
        nonlocal loaded
        loaded += rows.size * (columns or Span(0, 1)).size * dtype.itemsize
        if on_progress is not None:
            on_progress(loaded, total)

    as_expert = not spec.mlp_bias and compiled.fits_mlp(spec.hidden_size, shard.intermediate.size)
    in_pairs = {"experts_gate_up"} | ({"gate_up"} if as_expert else set())  # gate beside up

    def make(name: str, plan: _Plan) -> Any:  # what the field of this name takes
        matrices = source.matrices if name in _QUANTIZED else None
        if matrices is not None:
            plan = _Plan(plan.shape, tuple(plan.pieces))
            regions, into = _regions(plan), Into(device, dtype == torch.bfloat16, name in in_pairs, source.uploads)
            if matrices.keeps(regions, plan.shape, into.pairs):
                return _make_quantized(source.fill, matrices, plan.shape, regions, dtype, into, advance)
        shape, pairs = plan.shape, name in in_pairs
        if name in _PACKED and not (matrices is not None and name in _EXPERTS):  # both matrices of experts or none
            shape = compiled.packed_shape(shape, dtype, device, pairs)
        tensor = advise_huge_pages(torch.empty(shape, dtype=dtype, device=device))
        for piece in plan.pieces:
            part = tensor if piece.expert is None else tensor[piece.expert]
            if shape == plan.shape:
                source.fill(part[piece.row : piece.row + piece.rows.size], piece)
            else:
                _fill_packed(source.fill, part, piece, pairs)
            advance(piece.rows, piece.columns)
        return tensor

    ends, *layers = ({name: make(name, plan) for name, plan in plans.items()} for plans in _plan_all(spec, shard))
    if spec.tie_word_embeddings and shard.is_last:
        ends["lm_head"] = ends["embed"]
    return ShardWeights([LayerWeights(**layer) for layer in layers], **ends)


def _regions(plan: _Plan) -> list[Region]:
    return [Region(one.name, one.rows, one.columns or Span(0, 1), one.row, one.expert) for one in plan.pieces]


def _make_quantized(
    fill: _Fill, matrices: MatrixSource, shape: tuple[int, ...], regions: list[Region], dtype: torch.dtype, into: Into,
    advance: Callable[[Span, Span | None], None],
) -> Weight:  # fmt: skip
    """Return a weight some or all of whose regions are quantised; `advance` is told of every one."""

    def done(region: Region) -> None:
        advance(region.rows, region.columns)

    def plain(region: Region) -> torch.Tensor:
        tensor = torch.empty(region.rows.size, region.columns.size, dtype=dtype, device=into.device)
        fill(tensor, _Piece(region.name, region.rows, region.columns))
        return tensor

    if len(shape) == 3:
        return load_experts(matrices, shape, regions, into, done)
    return load_matrix(matrices, regions, into, plain, done)


def _fill_packed(fill: _Fill, target: torch.Tensor, piece: _Piece, pairs: bool) -> None:
    """Fill a part of one packed matrix through a buffer of plain rows."""
    assert piece.columns is not None
    width = piece.columns.size
    step = max(1, _CHUNK_BYTES // (target.itemsize * width * _DUMMY_ROWS)) * _DUMMY_ROWS
    for start in range(piece.rows.start, piece.rows.stop, step):
        rows = Span(start, min(start + step, piece.rows.stop))
        plain = torch.empty(rows.size, width, dtype=target.dtype)
        fill(plain, piece._replace(rows=rows))
        compiled.pack_rows(target, piece.row + start - piece.rows.start, plain, pairs)


def _plan_all(spec: ModelSpec, shard: ShardSpec) -> Iterator[dict[str, _Plan]]:
    """Yield the plans of the tensors of `ShardWeights` by name, then those of every layer."""
    yield _plan_ends(spec, shard)
    for layer in range(*shard.layers):
        yield _plan_layer(spec, shard, layer)


def _plan_ends(spec: ModelSpec, shard: ShardSpec) -> dict[str, _Plan]:
    hidden, tied = Span(0, spec.hidden_size), spec.tie_word_embeddings
    plans = {}
    if shard.is_first or (shard.is_last and tied):
        plans["embed"] = _stacked(hidden, (EMBEDDING, shard.vocab))
    if shard.is_last:
        plans["norm"] = _stacked(None, ("model.norm.weight", hidden))
        if not tied:
            plans["lm_head"] = _stacked(hidden, ("lm_head.weight", shard.vocab))
    return plans


def _plan_layer(spec: ModelSpec, shard: ShardSpec, layer: int) -> dict[str, _Plan]:
    prefix, hidden = f"model.layers.{layer}.", Span(0, spec.hidden_size)
    attention = prefix + "self_attn."
    queries, keys = _times(shard.heads, spec.head_dim), _times(shard.kv_heads, spec.head_dim)
    plans = {
        "input_norm": _stacked(None, (prefix + "input_layernorm.weight", hidden)),
        "post_norm": _stacked(None, (prefix + "post_attention_layernorm.weight", hidden)),
        "qkv_weight": _stacked(
            hidden, *((f"{attention}{x}_proj.weight", queries if x == "q" else keys) for x in "qkv")
        ),
        "o_weight": _stacked(queries, (attention + "o_proj.weight", hidden)),
    }
    if spec.qkv_bias:
        plans["qkv_bias"] = _stacked(
            None, *((f"{attention}{x}_proj.bias", queries if x == "q" else keys) for x in "qkv")
        )
    if spec.o_bias and shard.rank == 0:
        plans["o_bias"] = _stacked(None, (attention + "o_proj.bias", hidden))
    if spec.qk_norm:
        plans["q_norm"] = _stacked(None, (attention + "q_norm.weight", Span(0, spec.head_dim)))
        plans["k_norm"] = _stacked(None, (attention + "k_norm.weight", Span(0, spec.head_dim)))
    mlp = _plan_experts if spec.is_moe_layer(layer) else _plan_dense
    return plans | mlp(spec, shard, prefix + "mlp.")


def _plan_dense(spec: ModelSpec, shard: ShardSpec, prefix: str) -> dict[str, _Plan]:
    hidden, own = Span(0, spec.hidden_size), shard.intermediate
    plans = {
        "gate_up": _stacked(hidden, (prefix + "gate_proj.weight", own), (prefix + "up_proj.weight", own)),
        "down": _stacked(own, (prefix + "down_proj.weight", hidden)),
    }
    if spec.mlp_bias:
        plans["gate_up_bias"] = _stacked(None, (prefix + "gate_proj.bias", own), (prefix + "up_proj.bias", own))
        if shard.rank == 0:
            plans["down_bias"] = _stacked(None, (prefix + "down_proj.bias", hidden))
    return plans


def _plan_experts(spec: ModelSpec, shard: ShardSpec, prefix: str) -> dict[str, _Plan]:
    hidden, width = Span(0, spec.hidden_size), Span(0, spec.moe_intermediate_size)
    own = [f"{prefix}experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")]
    experts = range(*shard.experts)
    gate_up = (
        _Piece(own[part].format(expert), width, hidden, part * width.size, index)
        for index, expert in enumerate(experts)
        for part in range(2)
    )
    down = (_Piece(own[2].format(expert), hidden, width, 0, index) for index, expert in enumerate(experts))
    count = shard.experts.size
    return {
        "router": _stacked(hidden, (prefix + "gate.weight", Span(0, spec.num_experts))),
        "experts_gate_up": _Plan((count, 2 * width.size, hidden.size), gate_up),
        "experts_down": _Plan((count, hidden.size, width.size), down),
    }


def _times(span: Span, factor: int) -> Span:
    return Span(span.start * factor, span.stop * factor)


def _stacked(columns: Span | None, *parts: tuple[str, Span]) -> _Plan:
    """Return the plan of row ranges of several tensors below each other, all with the same `columns`; None: vectors."""
    pieces, row = [], 0
    for name, rows in parts:
        pieces.append(_Piece(name, rows, columns, row))
        row += rows.size
    return _Plan((row, columns.size) if columns else (row,), tuple(pieces))


def _from_files(checkpoint: Checkpoint, spec: ModelSpec, stack: ExitStack, uploads: Uploads) -> _Source:
    """Return what copies regions of safetensors files; slices are views of the mapped file, which the copy reads."""
    from safetensors import safe_open

    @functools.cache
    def opened(file: str) -> Any:
        return stack.enter_context(safe_open(checkpoint.model_dir / file, framework="pt", device="cpu"))

    def fill(target: torch.Tensor, piece: _Piece) -> None:
        stored = checkpoint.tensors[piece.name]
        view = opened(stored.file).get_slice(stored.name)
        step = max(1, _CHUNK_BYTES // (4 * max(1, math.prod(target.shape[1:]))))  # 4 bytes: the widest stored dtype
        for start in range(0, target.shape[0], step):
            rows = range(*piece.rows)[start : start + step]
            part = slice(stored.first_row + rows.start, stored.first_row + rows.stop)
            if piece.columns is None:
                source = view[part]
            else:
                region = (part, slice(*piece.columns))[:: -1 if stored.transposed else 1]
                source = view[region] if stored.expert is None else view[(stored.expert, *region)]
                source = source.T if stored.transposed else source
            uploads.copy(target[start : start + step], source)

    if spec.quant is None:
        return _Source(fill, uploads)
    from workers.model.quantized_sources import FileMatrices

    return _Source(fill, uploads, FileMatrices(checkpoint, spec, spec.quant, opened))


def _from_gguf(
    checkpoint: Checkpoint, path: Path, head_dim: int, stack: ExitStack, uploads: Uploads, keeps: bool
) -> _Source:
    """Return what copies regions of a GGUF file; without `keeps` all are unpacked, a few rows at a time."""
    from workers.model.quantized_sources import GgufMatrices
    from workers.quant.gguf.source import GgufSource

    source = stack.enter_context(GgufSource(path, head_dim))

    def fill(target: torch.Tensor, piece: _Piece) -> None:
        stored = checkpoint.tensors[piece.name]
        columns = None if piece.columns is None else range(*piece.columns)
        step = max(1, _CHUNK_BYTES // (4 * max(1, math.prod(target.shape[1:]))))
        for start in range(0, target.shape[0], step):
            rows = range(*piece.rows)[start : start + step]
            uploads.copy(target[start : start + step], source.plain(piece.name, stored, rows, columns))

    return _Source(fill, uploads, GgufMatrices(checkpoint, source) if keeps else None)


def _random(spec: ModelSpec, seed: int) -> _Fill:
    """Return what makes random tensors in blocks of rows with seeds of their own, so any region is made by itself."""
    plans = (plan for plans in _plan_all(spec, whole_model(spec)) for plan in plans.values())
    pieces = (piece for plan in plans for piece in plan.pieces)  # whole tensors; a vector is one column
    shapes = {one.name: (one.rows.size, (one.columns or Span(0, 1)).size) for one in pieces}

    def fill(target: torch.Tensor, piece: _Piece) -> None:
        if piece.name.endswith("norm.weight") or target.is_meta:  # which has a shape alone
            target.fill_(1.0)
            return
        full_rows, full_columns = shapes[piece.name]
        rows, columns = piece.rows, piece.columns or Span(0, 1)
        scale = 1.0 if piece.name == EMBEDDING else _DUMMY_SCALE  # with smaller ones, all rows go to the same experts
        for start in range(rows.start - rows.start % _DUMMY_ROWS, rows.stop, _DUMMY_ROWS):
            digest = hashlib.sha256(f"{seed}:{piece.name}:{start}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            block = torch.randn(min(_DUMMY_ROWS, full_rows - start), full_columns, generator=generator)
            first, last = max(rows.start, start), min(rows.stop, start + len(block))
            part = block[first - start : last - start, slice(*columns)].mul_(scale)
            target[first - rows.start : last - rows.start].copy_(part if piece.columns else part[:, 0])

    return fill
