"""The outside oracle of dual chunk attention: transformers' modules around attention from its definition, in float32.

Transformers itself does not compute dual chunk attention. Every layer is its own (projections, norms, experts); only
rotation and attention are those of `tests.support.data.dual_chunk`, pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from protos.model.spec import DualChunkSpec
from tests.support.data.dual_chunk import length_scale, pairwise_attention, relative_positions
from tests.support.oracles.transformers import Reference, is_clear, random_prompt

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of every layer, not rotated


class DualChunkOracle:
    """A checkpoint of transformers under dual chunk attention; sizes are plain numbers, as in its config."""

    def __init__(self, model_dir: Path, dual: DualChunkSpec) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self._chunk, self._local = dual.chunk_size, dual.local_size
        self._original = dual.original_max_position_embeddings
        config = self.model.config
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            base, dim = config.rope_parameters["rope_theta"], config.head_dim
            self._inv_freq, factor = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
        else:
            self._inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self._temperature = 1.0 if self._original > 0 else factor  # of queries and of keys
        self._known: dict[tuple[tuple[int, ...], int], Reference] = {}

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> Reference:
        """`count` greedy tokens: the whole prompt in one piece, then token by token; remembered per prompt."""
        key = (tuple(prompt), count)
        if key not in self._known:
            cache: Cache = []
            tokens, rows = list(prompt), []
            pending = tokens
            while len(rows) < count:
                rows.append(self._forward(pending, len(tokens) - len(pending), len(prompt), cache))
                pending = [int(rows[-1].argmax())]
                tokens += pending
            self._known[key] = Reference(tuple(tokens[len(prompt) :]), torch.stack(rows))
        return self._known[key]

    def prompt(self, length: int, count: int, begin: Sequence[int] = ()) -> list[int]:
        """A random prompt that begins with `begin`, whose next `count` tokens are no matter of rounding."""
        vocab = self.model.config.vocab_size
        for seed in range(20):
            rest = random_prompt(length - len(begin), vocab, seed=1000 * length + seed)
            if is_clear(self.greedy([*begin, *rest], count)):
                return [*begin, *rest]
        raise AssertionError("no prompt is clear")

    def _forward(self, ids: Sequence[int], start: int, prompt_len: int, cache: Cache) -> torch.Tensor:
        """Logits after the last of `ids`, which stand at positions from `start` on."""
        inner = self.model.model
        x = inner.embed_tokens(torch.tensor([ids]))
        stretch = [length_scale(start + row, prompt_len, self._original) for row in range(len(ids))]
        positions = torch.arange(start, start + len(ids))
        relative = relative_positions(positions, torch.arange(start + len(ids)), self._chunk, self._local)
        for index, layer in enumerate(inner.layers):
            q, k, v = _project(layer.self_attn, layer.input_layernorm(x))
            if start:
                k, v = (torch.cat(pair) for pair in zip(cache[index], (k, v), strict=True))
                cache[index] = (k, v)
            else:
                cache.append((k, v))
            scales = q.shape[-1] ** -0.5 * torch.tensor(stretch, dtype=torch.float64) ** 2 * self._temperature**2
            visible = None if start else self._visible(index, q, k, scales)
            out = pairwise_attention(q, k, v, relative, self._inv_freq, scales, visible)
            x = x + layer.self_attn.o_proj(out.float().flatten(1))[None]
            hidden = layer.mlp(layer.post_attention_layernorm(x))
            x = x + (hidden[0] if isinstance(hidden, tuple) else hidden)
        return self.model.lm_head(inner.norm(x[0, -1])).float()

    def _visible(self, layer: int, q: torch.Tensor, k: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:
        """Pairs `[H, T, S]` of a whole prompt that take part in one layer; None: all."""
        return None


def _project(attention: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values `[T, heads, D]`, normed where the model does, not rotated."""
    shape = (x.shape[1], -1, attention.head_dim)
    q, k, v = (part(x)[0].view(shape) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v
