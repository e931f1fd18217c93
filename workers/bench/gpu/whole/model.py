"""Qwen3-30B-A3B with random weights that are made on the device, and runners of it with KV of their own.

A rehearsal has a tiny model of the same kind in float32, computed by the interpreted kernels of GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, RopeSpec, SparseSpec
from workers.bench.gpu.context import Context
from workers.bench.gpu.rates.attention import fill
from workers.kv.paged import PagedKV
from workers.model.weights import LayerWeights, ShardWeights, whole_model
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives

_SCALE = 0.02
_QWEN3_30B_A3B = ModelSpec(
    model_type="qwen3_moe", vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, intermediate_size=6144, rms_norm_eps=1e-6, tie_word_embeddings=False,
    qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=True, rope=RopeSpec(1e7), max_position_embeddings=262_144,
    dtype="bfloat16", eos_token_ids=(151_645,), num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip
_CHUNKS = DualChunkSpec(chunk_size=262_144, local_size=8192, original_max_position_embeddings=262_144)


def model_spec(context: Context) -> ModelSpec:
    """Return the shape of the model, with dense attention."""
    sizes = context.sizes
    if not context.rehearsal:
        return _QWEN3_30B_A3B
    return replace(
        _QWEN3_30B_A3B, vocab_size=sizes.vocab, hidden_size=sizes.hidden, num_hidden_layers=1,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.dims[0],
        num_experts=sizes.experts, num_experts_per_tok=sizes.top_k, moe_intermediate_size=sizes.inter, dtype="float32",
    )  # fmt: skip


def attention_spec(context: Context, sparse: bool, chunks: bool) -> ModelSpec:
    """Return the model's shape with sparse prefill (the recall floor off) and dual chunk attention, or without."""
    sizes = context.sizes
    chosen = SparseSpec(
        threshold=1 if context.rehearsal else 32_768, last_q=sizes.last_q, cell=sizes.cell,
        uniform=HeadBudget(sizes.columns, sizes.offsets),
    )  # fmt: skip
    tiny = DualChunkSpec(chunk_size=3 * sizes.cell, local_size=sizes.cell, original_max_position_embeddings=64)
    return replace(
        model_spec(context),
        sparse=chosen if sparse else None,
        dual_chunk=(tiny if context.rehearsal else _CHUNKS) if chunks else None,
    )


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> ShardWeights:
    """Return random weights, of the scales of `workers.model.weights.dummy_shard`; all layers have experts."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def matrix(*shape: int, scale: float = _SCALE) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    hidden, dim, heads = spec.hidden_size, spec.head_dim, spec.num_attention_heads
    layers = [
        LayerWeights(
            input_norm=ones(hidden), post_norm=ones(hidden), q_norm=ones(dim), k_norm=ones(dim),
            qkv_weight=matrix((heads + 2 * spec.num_key_value_heads) * dim, hidden),
            o_weight=matrix(hidden, heads * dim),
            router=matrix(spec.num_experts, hidden),
            experts_gate_up=matrix(spec.num_experts, 2 * spec.moe_intermediate_size, hidden),
            experts_down=matrix(spec.num_experts, hidden, spec.moe_intermediate_size),
        )
        for _ in range(spec.num_hidden_layers)
    ]  # fmt: skip
    ends = matrix(spec.vocab_size, hidden, scale=1.0), matrix(spec.vocab_size, hidden)
    return ShardWeights(layers, embed=ends[0], norm=ones(hidden), lm_head=ends[1])


def weights_of(context: Context) -> ShardWeights:
    """Return the weights, made once a process."""
    if "weights" not in context.kept:
        context.free()
        context.kept["weights"] = random_weights(model_spec(context), context.dtype, context.device)
    return context.kept["weights"]


def runner_of(
    context: Context, spec: ModelSpec, tokens: int, cache: torch.dtype | None, filled: bool = False
) -> ModelRunner:
    """Return a runner with KV for one sequence; `filled` with random keys and values.

    Args:
        cache: the type of the KV, None for that of the model.
    """
    weights, page = weights_of(context), context.sizes.page
    context.free()
    kv = PagedKV(
        spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim, -(-tokens // page), page,
        cache or context.dtype, context.device,
    )  # fmt: skip
    if filled:
        fill(context, kv, spec.num_hidden_layers)
    return ModelRunner(spec, whole_model(spec), weights, kv, Collectives(), context.device)


class _Again:
    """Stands for CUDA graphs in a rehearsal: a replay does the work once more."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


def capture_graphs(context: Context, runner: ModelRunner) -> bool:
    """Have steps of one row run as graphs, as in a stage; returns whether they do."""
    return runner.capture_decode(1, _Again() if context.rehearsal else None)


def prompt(spec: ModelSpec, length: int) -> list[int]:
    """Return random ids, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, min(32_000, spec.vocab_size), (length,), generator=generator).tolist()


def decode_bytes(spec: ModelSpec, keys: int, cache: torch.dtype, itemsize: int = 2) -> int:
    """Return the bytes that a decode step of one row must read: weights it touches, and the KV of its context."""
    hidden, dim = spec.hidden_size, spec.head_dim
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    attention = (heads + 2 * kv_heads) * dim * hidden + hidden * heads * dim
    experts = spec.num_experts * hidden + spec.num_experts_per_tok * 3 * spec.moe_intermediate_size * hidden
    weights = spec.num_hidden_layers * (attention + experts) + spec.vocab_size * hidden
    token = 2 * kv_heads * (dim * cache.itemsize + (4 if cache.itemsize == 1 else 0))
    return weights * itemsize + spec.num_hidden_layers * keys * token


def num_weights(spec: ModelSpec) -> int:
    """Return the number of weights."""
    made = random_weights(spec, torch.bfloat16, torch.device("meta"))
    tensors = [made.embed, made.norm, made.lm_head]
    for layer in made.layers:
        tensors += [getattr(layer, name) for name in LayerWeights.__dataclass_fields__]
    return sum(math.prod(tensor.shape) for tensor in tensors if tensor is not None)


@contextmanager
def on_interpreted_kernels(context: Context) -> Iterator[None]:
    """In a rehearsal have a CPU take the paths of a GPU; else do nothing."""
    if not context.rehearsal:
        yield
        return

    def yes(*_: Any) -> bool:
        return True

    def no(*_: Any) -> bool:
        return False

    with ExitStack() as stack:
        for target, answer in (
            ("workers.kernels.triton.layer.calls.supports", yes),
            ("workers.attention.cuda.supports", yes),
            ("workers.attention.cuda.supports_lists", yes),
            ("workers.attention.compiled.supports", no),
        ):
            stack.enter_context(mock.patch(target, answer))
        yield
