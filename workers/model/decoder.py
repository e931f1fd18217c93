"""The decoder: one transformer driven by `ModelSpec`, computing the layers, heads and experts of one shard.

Reading order: embedding, layers (norm, attention, norm, MLP or experts), final norm, output head.

Legend: `T` tokens of the step, `M` hidden size, `H` and `K` query and KV heads of this shard, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from protos.model.spec import ModelSpec
from protos.stage.messages import ShardSpec
from workers.attention import cuda
from workers.attention.attend import attend
from workers.attention.plan import Queries, Rotation
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV
from workers.model.batch import Batch, Piece
from workers.model.device import step as device_step
from workers.model.device.prefill import DevicePrefill
from workers.model.device.step import DeviceStep
from workers.model.device.tables import DeviceTables
from workers.model.fused import FusedCall, FusedLayers
from workers.model.layers import add_rms_norm, gated_mlp, linear
from workers.model.moe import ExpertScratch, route, run_experts, stays_on_device
from workers.model.rope import Rotary, Rotations, norm_and_rotate_
from workers.model.sparse_prefill import CellLog, SparsePrefill
from workers.model.weights import LayerWeights, ShardWeights
from workers.quant.packed import look_up
from workers.sparse.cuda import HeadBudgets
from workers.transport.collectives import Collectives

if TYPE_CHECKING:
    from workers.kernels.triton.layer.decode import Rows


@dataclass(frozen=True, slots=True)
class Ready:
    """The part of a step that is known without its activations."""

    batch: Batch
    kv: PagedKV
    rotations: Rotations
    fused: FusedCall | None  # set where all layers are one call
    device: DeviceStep | None = None  # set where Triton's kernels run


class Decoder:
    """The layers of one shard; stateless apart from the weights, as KV and batch come from the runner."""

    def __init__(
        self, spec: ModelSpec, shard: ShardSpec, weights: ShardWeights, collectives: Collectives, device: torch.device
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.dtype = weights.layers[0].input_norm.dtype  # of the activations too
        self._weights = weights
        self._collectives = collectives
        self._rotary = Rotary(spec.rope, spec.head_dim, device, spec.dual_chunk)
        self._scratch = ExpertScratch()
        self._head_norms = [self._head_norm(layer) for layer in weights.layers]
        on_cpu = device.type == "cpu" and FusedLayers.supports_weights(spec, weights.layers)
        self._fused = FusedLayers(spec, shard, weights.layers, self._head_norms) if on_cpu else None
        self._budgets: HeadBudgets | None = None  # of heads that are selected for on the device
        if calls.supports(device):
            calls.warn_unproven(device)
        if spec.sparse is not None and calls.supports(device):
            self._budgets = HeadBudgets(spec.sparse, range(*shard.layers), range(*shard.heads), device)
        self._layers_done = 0
        self.on_experts: Callable[[int, torch.Tensor], None] | None = None  # layer, experts `[T, k]`; for measuring
        self.settle: Callable[[], object] = lambda: None  # called before the host reads what the device computes

    @property
    def layers_done(self) -> int:
        """The number of layers computed so far; it grows while a step runs, unlike in a step that hangs."""
        return self._layers_done + (self._fused.layers_done if self._fused else 0)

    def count_replay(self) -> None:
        """Count the layers of a step that was computed as a captured graph."""
        self._layers_done += len(self._weights.layers)

    @property
    def is_capturable(self) -> bool:
        """Whether steps that decode need nothing but the device: no other shard, and no host that reads results."""
        layers = [(layer.input_norm, layer.experts_gate_up, layer.experts_down) for layer in self._weights.layers]
        return self._collectives.size == 1 and all(
            gate_up is None or down is None or stays_on_device(like, gate_up, down) for like, gate_up, down in layers
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids `[T]` as `[T, M]`; each shard looks up its rows of the vocabulary, and the sum is exact."""
        table = self._weights.embed
        assert table is not None, "only the first stage embeds"
        if self._collectives.size == 1:
            return look_up(table, token_ids)
        local = token_ids - self.shard.vocab.start
        own = (local >= 0) & (local < self.shard.vocab.size)
        rows = look_up(table, torch.where(own, local, 0))
        return self._collectives.all_reduce(rows * own[:, None].to(rows.dtype))

    def prepare(self, batch: Batch, kv: PagedKV, tables: DeviceTables | None = None) -> Ready:
        """Do the part of `layers` that needs no activations; keys and values will go to `kv`.

        Args:
            tables: those of sequences that decode, where Triton's kernels run.

        Raises:
            PlanMismatch: a slot of the batch lies outside the cache.
        """
        rotations = self._rotary.rotations(batch.positions, batch.regions)
        fused = self._fused if self._fused is not None and self._fused.supports_step(batch, kv) else None
        call = fused.prepare(batch, kv, rotations) if fused else None
        if tables is None:
            return Ready(batch, kv, rotations, call)
        return Ready(batch, kv, rotations, call, DeviceStep.of(batch, kv, rotations, self.spec.chunk_distance, tables))

    def prepare_rows(self, positions: torch.Tensor, slots: torch.Tensor, rows: Rows, kv: PagedKV) -> Ready:
        """Do the same for rows that decode without reading or copying anything on the host, so it can be captured.

        Args:
            positions, slots: `[B]` int32 of each row and its key.
        """
        rotations = self._rotary.rotations(positions, tuple(Rotation) if self.spec.dual_chunk else (Rotation.INTRA,))
        batch = Batch(positions, (), (), positions[:0])
        return Ready(batch, kv, rotations, None, DeviceStep.of_rows(slots, rows, rotations))

    def layers(self, x: torch.Tensor, ready: Ready, log: CellLog | None = None) -> torch.Tensor:
        """Run this shard's layers on `x` `[T, M]` of the step prepared last; reports of sparse cells go to `log`."""
        if self._fused is not None and ready.fused is not None:
            return self._fused.run(x, ready.fused, self._collectives)
        log = log or CellLog()
        sparse = self._sparse(ready, x.dtype, log)
        eps, delta = self.spec.rms_norm_eps, None
        for index, (layer, weights) in enumerate(zip(range(*self.shard.layers), self._weights.layers, strict=True)):
            x, normed = add_rms_norm(x, delta, weights.input_norm, eps)
            delta = None  # its memory is that of x now, and given back with it
            x, normed = add_rms_norm(x, self._attention(normed, index, weights, ready, sparse), weights.post_norm, eps)
            delta = self._mlp(normed, layer, weights, None if ready.device is None else ready.device.idle)
            self._layers_done += 1
        if isinstance(sparse, DevicePrefill):
            log.on_device = sparse.reports
        return x if delta is None else delta.add_(x)

    def _sparse(self, ready: Ready, dtype: torch.dtype, log: CellLog) -> SparsePrefill | DevicePrefill | None:
        """Return what attends the sparse cells of a step, or on a device all rows that do not decode; None without."""
        batch, device, cache = ready.batch, ready.batch.positions.device, ready.kv.layer(0).keys.dtype
        if ready.device is not None and cuda.supports_lists(device, dtype, self.spec.head_dim, cache):
            others = ready.device.others
            common = self.spec, self.shard, self._rotary, batch, self._budgets
            return DevicePrefill(others, *common) if others else None
        if not any(piece.sparse for piece in batch.pieces):
            return None
        return SparsePrefill(self.spec, self.shard, self._rotary, batch, log)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits `[n, vocab_size]` in float32, whole on every shard, of rows `[n, M]` after the last layer."""
        norm, head = self._weights.norm, self._weights.lm_head
        assert norm is not None, "only the last stage has the output head"
        assert head is not None, "only the last stage has the output head"
        local = linear(add_rms_norm(x, None, norm, self.spec.rms_norm_eps)[1], head).float()
        size = self._collectives.size
        if size == 1:
            return local
        widest = -(-self.spec.vocab_size // size)
        padded = F.pad(local, (0, widest - local.shape[1])) if local.shape[1] < widest else local
        parts = self._collectives.all_gather(padded)
        bounds = [self.spec.vocab_size * rank // size for rank in range(size + 1)]  # as `cluster.config.topology` cuts
        rank = self.shard.rank
        assert self.shard.vocab == (bounds[rank], bounds[rank + 1]), "the vocabulary is cut in another way"
        widths = (stop - start for start, stop in pairwise(bounds))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def _attention(
        self, x: torch.Tensor, index: int, weights: LayerWeights, step: Ready,
        sparse: SparsePrefill | DevicePrefill | None,
    ) -> torch.Tensor:  # fmt: skip
        dim, heads, kv_heads = self.spec.head_dim, self.shard.heads.size, self.shard.kv_heads.size
        qkv = linear(x, weights.qkv_weight, weights.qkv_bias).view(-1, heads + 2 * kv_heads, dim)
        norm = self._head_norms[index]
        if sparse is not None:
            layer = self.shard.layers.start + index
            sparse.begin_layer(layer, qkv[:, :heads], None if norm is None else norm[:heads])
        if step.device is not None:
            out = self._attend_on_device(qkv, index, norm, step, step.device, sparse)
        else:
            q = self._rotate_(qkv[:, : heads + kv_heads], step.rotations, norm)
            step.kv.write(index, step.batch.slots, *qkv[:, heads:].chunk(2, dim=1))
            assert not isinstance(sparse, DevicePrefill)
            parts = [self._attend_piece(piece, q, index, step, sparse) for piece in step.batch.pieces]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)  # pieces cover the rows in order
        return self._collectives.all_reduce(linear(out.flatten(1), weights.o_weight, weights.o_bias))

    def _attend_on_device(
        self, qkv: torch.Tensor, index: int, norm: torch.Tensor | None, step: Ready, device: DeviceStep,
        sparse: SparsePrefill | DevicePrefill | None,
    ) -> torch.Tensor:  # fmt: skip
        """Store the heads of `qkv` `[T, H + 2 K, D]` and attend: `[T, H, D]`; rows that decode share one call."""
        kv = step.kv.layer(index)
        q = device_step.store_heads(qkv, norm, self.spec.rms_norm_eps, device, kv)
        if not device.others:
            return device_step.attend_decoding(q, kv, device)
        queries, out = Queries(*q), torch.empty_like(q[0])
        if isinstance(sparse, DevicePrefill):
            sparse.attend(queries, kv, out)
        else:
            for piece in device.others:
                out[piece.rows] = self._attend_piece(piece, queries, index, step, sparse)
        if device.rows is not None:
            out[device.decoding] = device_step.attend_decoding(q, kv, device)
        return out

    @staticmethod
    def _attend_piece(piece: Piece, q: Queries, index: int, step: Ready, sparse: SparsePrefill | None) -> torch.Tensor:
        rows, kv = q[piece.rows], step.kv.layer(index)
        if piece.sparse and sparse is not None:
            return sparse.attend(piece, rows, kv)
        return attend(rows, kv, piece.table, piece.plan, piece.scales)

    def _head_norm(self, weights: LayerWeights) -> torch.Tensor | None:
        """Return the norm weights of every query and key head, `[H + K, D]` float32; None for models without."""
        if weights.q_norm is None or weights.k_norm is None:
            return None
        sides = ((weights.q_norm, self.shard.heads.size), (weights.k_norm, self.shard.kv_heads.size))
        return torch.cat([norm.expand(heads, self.spec.head_dim) for norm, heads in sides]).float()

    def _rotate_(self, qk: torch.Tensor, rotations: Rotations, norm: torch.Tensor | None) -> Queries:
        """Normalise and rotate queries and keys `[T, H + K, D]` in place, and queries of far regions into copies."""
        q = qk[:, : self.shard.heads.size]
        far = [rotation for rotation in rotations if rotation != Rotation.INTRA]
        copies = {rotation: torch.empty_like(q, memory_format=torch.contiguous_format) for rotation in far}
        rotated = [(copies[rotation], rotations[rotation]) for rotation in far]
        norm_and_rotate_(qk, rotations[Rotation.INTRA], norm, self.spec.rms_norm_eps, rotated)
        return Queries(q, copies.get(Rotation.SUCC), copies.get(Rotation.INTER))

    def _mlp(self, x: torch.Tensor, layer: int, weights: LayerWeights, idle: torch.Tensor | None) -> torch.Tensor:
        spec = self.spec
        if spec.is_moe_layer(layer):
            assert weights.router is not None
            assert weights.experts_gate_up is not None
            assert weights.experts_down is not None
            experts, scores = route(x, weights.router, spec.num_experts_per_tok, spec.norm_topk_prob)
            if idle is not None:  # whose experts nobody reads then
                experts = experts.masked_fill(idle, -1)
            if self.on_experts is not None:
                self.on_experts(layer, experts)
            out = run_experts(
                x, experts, scores, weights.experts_gate_up, weights.experts_down, self.shard.experts, self._scratch
            )
        else:
            assert weights.gate_up is not None
            assert weights.down is not None
            out = gated_mlp(x, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
        return self._collectives.all_reduce(out)
