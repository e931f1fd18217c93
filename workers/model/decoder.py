"""The decoder: one transformer driven by `ModelSpec`, computing the layers and slices of heads and experts of a shard.

Reading order: embedding, layers (norm, attention, norm, MLP or experts), final norm, output head.
Legend: `T` tokens of the step, `M` hidden size, `H` and `K` query and KV heads of this shard, `D` head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from protos.messages import ShardSpec
from protos.model_spec import ModelSpec
from workers.attention.flash import attend
from workers.batch import Batch
from workers.kv_cache import PagedKV
from workers.model.layers import gated_mlp, linear, rms_norm
from workers.model.moe import ExpertScratch, route, run_experts
from workers.model.rope import Rotary, norm_and_rotate_
from workers.model.weights import LayerWeights, ShardWeights
from workers.transport.collectives import Collectives


class Decoder:
    """The layers of one shard. Stateless apart from the weights: KV and batch come from the runner."""

    def __init__(
        self, spec: ModelSpec, shard: ShardSpec, weights: ShardWeights, collectives: Collectives, device: torch.device
    ) -> None:
        self.spec = spec
        self.shard = shard
        self._weights = weights
        self._collectives = collectives
        self._rotary = Rotary(spec.rope, spec.head_dim, device)
        self._scale = spec.head_dim**-0.5
        self._scratch = ExpertScratch()
        self.layers_done = 0  # rises while a step runs; tells slow from hung

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[T]` -> `[T, M]`; each shard looks up its rows of the vocabulary, the sum is exact."""
        table = self._weights.embed
        assert table is not None, "only the first stage embeds"
        if self._collectives.size == 1:
            return F.embedding(token_ids, table)
        local = token_ids - self.shard.vocab.start
        own = (local >= 0) & (local < self.shard.vocab.size)
        found = F.embedding(torch.where(own, local, 0), table) * own[:, None].to(table.dtype)
        return self._collectives.all_reduce(found)

    def layers(self, x: torch.Tensor, batch: Batch, kv: PagedKV) -> torch.Tensor:
        """Run this shard's layers on `[T, M]`; keys and values are written to `kv`."""
        cos, sin = self._rotary.cos_sin(batch.positions)
        for index, (layer, weights) in enumerate(zip(range(*self.shard.layers), self._weights.layers, strict=True)):
            normed = rms_norm(x, weights.input_norm, self.spec.rms_norm_eps)
            x = self._attention(normed, index, weights, batch, kv, cos, sin).add_(x)
            normed = rms_norm(x, weights.post_norm, self.spec.rms_norm_eps)
            x = self._mlp(normed, layer, weights).add_(x)
            self.layers_done += 1
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[n, M]` after the last layer -> logits `[n, vocab_size]` in float32, whole on every shard."""
        norm, head = self._weights.norm, self._weights.lm_head
        assert norm is not None, "only the last stage has the output head"
        assert head is not None, "only the last stage has the output head"
        local = linear(rms_norm(x, norm, self.spec.rms_norm_eps), head).float()
        size = self._collectives.size
        if size == 1:
            return local
        widest = -(-self.spec.vocab_size // size)
        padded = F.pad(local, (0, widest - local.shape[1])) if local.shape[1] < widest else local
        parts = self._collectives.all_gather(padded)
        bounds = [self.spec.vocab_size * rank // size for rank in range(size + 1)]  # as `cluster.topology` cuts
        rank = self.shard.rank
        assert self.shard.vocab == (bounds[rank], bounds[rank + 1]), "the vocabulary is cut in another way"
        widths = (stop - start for start, stop in pairwise(bounds))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def _attention(
        self, x: torch.Tensor, index: int, weights: LayerWeights, batch: Batch, kv: PagedKV,
        cos: torch.Tensor, sin: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        spec, dim = self.spec, self.spec.head_dim
        heads, kv_heads = self.shard.heads.size, self.shard.kv_heads.size
        qkv = linear(x, weights.qkv_weight, weights.qkv_bias).view(-1, heads + 2 * kv_heads, dim)
        norm = None
        if weights.q_norm is not None and weights.k_norm is not None:
            norm = torch.cat([weights.q_norm.expand(heads, dim), weights.k_norm.expand(kv_heads, dim)]).float()
        norm_and_rotate_(qkv[:, : heads + kv_heads], cos, sin, norm, spec.rms_norm_eps)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        kv.write(index, batch.slots, k, v)
        keys, values = kv.keys(index), kv.values(index)
        parts = [attend(q[part.rows], keys, values, part.table, part.plan, self._scale) for part in batch.slices]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # slices cover the rows in order
        return self._collectives.all_reduce(linear(out.flatten(1), weights.o_weight, weights.o_bias))

    def _mlp(self, x: torch.Tensor, layer: int, weights: LayerWeights) -> torch.Tensor:
        spec = self.spec
        if spec.is_moe_layer(layer):
            assert weights.router is not None
            assert weights.experts_gate_up is not None
            assert weights.experts_down is not None
            experts, scores = route(x, weights.router, spec.num_experts_per_tok, spec.norm_topk_prob)
            out = run_experts(
                x, experts, scores, weights.experts_gate_up, weights.experts_down, self.shard.experts, self._scratch
            )
        else:
            assert weights.gate_up is not None
            assert weights.down is not None
            out = gated_mlp(x, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
        return self._collectives.all_reduce(out)
