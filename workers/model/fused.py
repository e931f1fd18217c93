"""All layers of a shard for a few rows in one call of the compiled kernels: a decode step.

The fallback is `Decoder`, which calls the same operations one by one and is equal bit for bit. It is used for long
steps, sparse cells, biased MLPs and those whose gate and up differ in type, other types and devices, and on machines
without a compiler.

Legend: `T` rows, `M` hidden size, `H` and `K` query and KV heads of the shard, `D` head dim, `k` experts per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec, Span
from workers.attention.compiled import fill_args
from workers.attention.plan import Rotation
from workers.kernels import abi
from workers.kernels.abi import Layer, Piece, Step
from workers.kernels.build import exported
from workers.kv.paged import PagedKV, PlanMismatch
from workers.model import compiled
from workers.model.batch import Batch
from workers.model.rope import Rotations
from workers.model.weights import LayerWeights
from workers.quant.weight import RowStack
from workers.transport.collectives import Collectives

MAX_ROWS = 64  # with more, the time of the interpreter between two operations no longer matters


class FusedCall(NamedTuple):
    """The activations of a step `[T, M]`, which become the result, and the arrays that must outlive the call."""

    x: torch.Tensor
    kept_alive: list[object]


class FusedLayers:
    """The layers of one shard; not for several threads at once, as the buffers of a step are shared."""

    def __init__(
        self, spec: ModelSpec, shard: ShardSpec, layers: Sequence[LayerWeights],
        head_norms: Sequence[torch.Tensor | None],
    ) -> None:  # fmt: skip
        """Take the weights; `head_norms` has those of every query and key head `[H + K, D]` float32, per layer."""
        self._spec, self._shard = spec, shard
        self._weights = (list(layers), list(head_norms))  # the structures hold addresses only
        self._layers = (Layer * len(layers))(*map(self._layer, layers, head_norms))
        self._kv: PagedKV | None = None
        self._out = torch.empty(MAX_ROWS, spec.hidden_size, dtype=torch.bfloat16)
        self._step, self._buffers = self._buffers_of_a_step()
        self._done = ctypes.c_int64(0)

    @staticmethod
    def supports_weights(spec: ModelSpec, layers: Sequence[LayerWeights]) -> bool:
        """Return whether the weights of all layers are packed, all with experts or all without, and sizes fit."""
        if compiled.path() is None or not layers:
            return False
        return (
            spec.hidden_size % 16 == 0
            and spec.head_dim % 32 == 0
            and spec.head_dim <= min(abi.MAX_ROTATED_DIM, abi.MAX_HEAD_DIM)
            and spec.num_experts <= abi.MAX_EXPERTS
            and spec.num_experts_per_tok <= abi.MAX_TOP_K
            and (all(map(_has_packed_experts, layers)) or all(map(_has_packed_mlp, layers)))
        )

    @property
    def layers_done(self) -> int:
        """The number of layers computed so far in all steps; any thread may ask."""
        return int(self._done.value)

    @staticmethod
    def supports_step(batch: Batch, kv: PagedKV) -> bool:
        """Return whether the rows of a batch can be computed in one call."""
        few = len(batch.positions) <= MAX_ROWS and kv.layer(0).keys.dtype in (torch.bfloat16, torch.int8)
        return few and not any(piece.sparse for piece in batch.pieces)

    def prepare(self, batch: Batch, kv: PagedKV, rotations: Rotations) -> FusedCall:
        """Prepare a call up to its activations; keys and values will go to `kv`.

        Raises:
            PlanMismatch: a slot of the batch lies outside the cache.
        """
        self._bind(kv)
        x = torch.empty(len(batch.positions), self._spec.hidden_size, dtype=torch.bfloat16)
        step, cache = self._step, kv.layer(0)
        rows = [slot for first, length in batch.slots for slot in range(first, first + length)]
        if len(rows) != x.shape[0] or not 0 <= min(rows) <= max(rows) < cache.keys.shape[1]:
            raise PlanMismatch(f"{x.shape[0]} rows, slots {rows[:3]}...: outside the cache of {cache.keys.shape[1]}")
        slots = (ctypes.c_int64 * len(rows))(*rows)
        pieces = (Piece * len(batch.pieces))()
        heads = (self._shard.heads.size, self._shard.kv_heads.size, self._spec.head_dim)
        for target, piece in zip(pieces, batch.pieces, strict=True):
            fill_args(target.args, cache, piece.table, piece.plan, piece.scales, *heads, torch.bfloat16)
            target.row = piece.rows.start
        for region in Rotation:
            one = rotations.get(region)
            step.cos[region] = None if one is None else one.cos.data_ptr()
            step.sin[region] = None if one is None else one.sin.data_ptr()
            step.cos_stride[region] = 0 if one is None else one.cos.stride(0)
            assert one is None or one.cos.stride() == one.sin.stride()
        step.x = x.data_ptr()
        step.slots, step.pieces = ctypes.addressof(slots), ctypes.addressof(pieces)
        step.tokens, step.num_pieces = x.shape[0], len(pieces)
        step.path, step.threads = compiled.path() or 0, torch.get_num_threads()
        return FusedCall(x, [slots, pieces])

    def run(self, x: torch.Tensor, call: FusedCall, collectives: Collectives) -> torch.Tensor:
        """Compute all layers on `x` `[T, M]`; `call` is the one prepared last.

        Raises:
            MemoryError: there is no room for the scratch memory of a call.
        """
        x = call.x.copy_(x)
        step = ctypes.byref(self._step)
        if collectives.size == 1:
            _check(exported("longreach_layers")(self._layers, len(self._layers), step, ctypes.byref(self._done)))
            return x
        out, half_layer = self._out[: x.shape[0]], exported("longreach_half_layer")
        for layer in self._layers:
            for half in range(2):
                _check(half_layer(ctypes.byref(layer), step, half))
                x.copy_(collectives.all_reduce(out).add_(x))
            self._done.value += 1
        return x

    def _layer(self, weights: LayerWeights, head_norm: torch.Tensor | None) -> Layer:
        spec, shard = self._spec, self._shard
        pointers = {
            "input_norm": weights.input_norm, "qkv_bias": weights.qkv_bias, "o_bias": weights.o_bias,
            "post_norm": weights.post_norm, "head_norm": head_norm,
        }  # fmt: skip
        is_dense = _has_packed_mlp(weights)
        experts = Span(0, 1) if is_dense else shard.experts
        matrices = {
            "o": weights.o_weight, "router": weights.router,
            "gate_up": weights.gate_up if is_dense else weights.experts_gate_up,
            "down": weights.down if is_dense else weights.experts_down,
        }  # fmt: skip
        packed = {name: matrix for name, matrix in matrices.items() if compiled.is_packed(matrix)}
        return Layer(
            **{name: None if one is None else one.data_ptr() for name, one in pointers.items()},
            **{name: compiled.describe(matrix) for name, matrix in packed.items()},
            qkv=(abi.Weights * 3)(*map(compiled.describe, _packed_qkv(weights))),
            heads=shard.heads.size, kv_heads=shard.kv_heads.size, dim=spec.head_dim, hidden_size=spec.hidden_size,
            all_experts=0 if is_dense else spec.num_experts, first=experts.start, experts=experts.size,
            top_k=1 if is_dense else spec.num_experts_per_tok, width=compiled.expert_width(packed["gate_up"]),
            eps=spec.rms_norm_eps, normalise=spec.norm_topk_prob,
        )  # fmt: skip

    def _buffers_of_a_step(self) -> tuple[Step, list[torch.Tensor]]:
        """Return the structure of a step with the addresses of its buffers, and the tensors that hold these."""
        spec, dim = self._spec, self._spec.head_dim
        heads, kv_heads = self._shard.heads.size, self._shard.kv_heads.size

        def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            buffers.append(torch.zeros(MAX_ROWS, *shape, dtype=dtype))
            return buffers[-1]

        buffers: list[torch.Tensor] = []
        far = [buffer(heads, dim), buffer(heads, dim)]
        top_k = max(1, spec.num_experts_per_tok)
        scores = buffer(top_k, dtype=torch.float32).fill_(1.0)  # of the one expert of dense layers, which is the first
        step = Step(
            out=self._out.data_ptr(), normed=buffer(spec.hidden_size).data_ptr(),
            qkv=buffer(heads + 2 * kv_heads, dim).data_ptr(),
            far=(ctypes.c_void_p * 2)(*(tensor.data_ptr() for tensor in far)), attended=buffer(heads, dim).data_ptr(),
            logits=buffer(max(1, spec.num_experts)).data_ptr(), rows=buffer(top_k, spec.hidden_size).data_ptr(),
            chosen=buffer(top_k, dtype=torch.int64).data_ptr(), weights=scores.data_ptr(),
        )  # fmt: skip
        return step, buffers

    def _bind(self, kv: PagedKV) -> None:
        """Set the addresses of the cache in the structures of the layers."""
        if kv is self._kv:
            return
        for index, layer in enumerate(self._layers):
            cache = kv.layer(index)
            layer.keys, layer.values, layer.kv_head = (
                cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.stride(0)
            )  # fmt: skip
            scales = cache.key_scales, cache.value_scales
            layer.key_scales, layer.value_scales = (None if one is None else one.data_ptr() for one in scales)
            layer.scale_head = 0 if scales[0] is None else scales[0].stride(0)
        self._kv = kv


def _packed_qkv(weights: LayerWeights) -> Sequence[compiled.Packed]:
    """Return the packed weight of queries, keys and values, or one of each; none where a part is not packed."""
    whole = weights.qkv_weight
    parts = whole.parts if isinstance(whole, RowStack) else (whole,)
    packed = [part for part in parts if compiled.is_packed(part)]
    return packed if len(packed) == len(parts) else ()


def _has_packed_experts(weights: LayerWeights) -> bool:
    matrices = (weights.o_weight, weights.router, weights.experts_gate_up, weights.experts_down)
    return bool(_packed_qkv(weights)) and all(map(compiled.is_packed, matrices))


def _has_packed_mlp(weights: LayerWeights) -> bool:
    """Return whether a dense layer is packed, its MLP as one expert."""
    gate_up = weights.gate_up
    is_packed = bool(_packed_qkv(weights)) and all(map(compiled.is_packed, (weights.o_weight, gate_up, weights.down)))
    return is_packed and compiled.is_packed(gate_up) and compiled.has_pairs(gate_up)


def _check(status: int) -> None:
    if status:
        abi.raise_for_status(
            status, f"a fused layer failed with status {status}: no memory for its scratch",
            f"a fused layer failed with status {status}: its plan leaves the page table or the cache",
        )  # fmt: skip
