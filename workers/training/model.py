"""A trainable Qwen3-MoE decoder in plain PyTorch, for checkpoints of a few million parameters.

Letters: `B` sequences, `L` tokens of a sequence, `T = B*L`, `M` hidden size, `H` query heads, `K` KV heads,
`D` head dim, `E` experts, `I` expert width. The residual stream, norms, softmaxes and master weights are float32;
matrix products follow the caller's autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN compiles a kernel for every new shape: rows of an expert's batch are padded to a multiple of this.
ROW_MULTIPLE = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the keys of `config.json` they come from are in `shape_of`."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    rope_theta: float
    norm_eps: float


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the sizes in a Qwen3-MoE `config.json`; ValueError if it asks for what this trainer does not do."""
    wanted = {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "rope_scaling": None,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key}={config[key]!r} cannot be trained here; it must be {value!r}")
    return Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )


def rope_frequencies(shape: Shape) -> Tensor:
    """Return the radians per position of each of the D/2 pairs, float32; pair i is dims i and i + D/2 of a head."""
    return shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [B, L, heads, D]; cos and sin are [L, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute attention of x [B, L, M] -> [B, L, M]."""
        batch, length, _ = x.shape
        group = self.shape.heads // self.shape.kv_heads
        q = self.q_proj(x).view(batch, length, self.shape.heads, self.shape.head_dim)
        k = self.k_proj(x).view(batch, length, self.shape.kv_heads, self.shape.head_dim)
        v = self.v_proj(x).view(batch, length, self.shape.kv_heads, self.shape.head_dim)
        q = rotate(self.q_norm(q.float()), cos, sin).to(v.dtype).transpose(1, 2)
        k = rotate(self.k_norm(k.float()), cos, sin).to(v.dtype).transpose(1, 2).repeat_interleave(group, dim=1)
        v = v.transpose(1, 2).repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """Top-k routed SwiGLU experts; weights are stacked over experts: gate and up [E, I, M], down [E, M, I]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)  # the router, under its published name
        self.gate_proj = nn.Parameter(torch.empty(shape.experts, shape.expert_width, shape.hidden))
        self.up_proj = nn.Parameter(torch.empty(shape.experts, shape.expert_width, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert_width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute x [T, M] -> (output [T, M] float32, load-balancing loss: 1 when every expert gets the same share)."""
        shape = self.shape
        with torch.autocast("cpu", enabled=False):
            probabilities = self.gate(x.float()).softmax(-1)
        weights, chosen = probabilities.topk(shape.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=shape.experts)
        share = counts / chosen.numel()
        balance = shape.experts * (share * probabilities.mean(0)).sum()

        # Each expert owns a run of rows, padded with copies of token 0 that weigh nothing.
        order = chosen.flatten().argsort(stable=True)
        runs = [-(-count // ROW_MULTIPLE) * ROW_MULTIPLE for count in counts.tolist()]
        rows = torch.zeros(sum(runs), dtype=torch.long)
        scale = torch.zeros(sum(runs))
        starts = torch.tensor(runs).cumsum(0) - torch.tensor(runs)
        slots = torch.arange(order.numel()) + (starts - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        rows[slots] = order // shape.top_k
        scale = scale.index_put((slots,), weights.flatten()[order])
        outputs = []
        matrices = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        for batch, (gate, up, down) in zip(x[rows].split(runs), matrices, strict=True):
            if len(batch):
                outputs.append(F.linear(F.silu(F.linear(batch, gate)) * F.linear(batch, up), down))
        mixed = torch.cat(outputs).float() * scale.unsqueeze(-1)
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, rows, mixed), balance


class Layer(nn.Module):
    """Attention and experts, each behind a norm, added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = Experts(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Compute x [B, L, M] float32 -> (the same, load-balancing loss)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        mixed, balance = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + mixed.view_as(x), balance


class NeedleModel(nn.Module):
    """The decoder with tied embeddings. Weights are unset until `init.initialise` or `checkpoint.load_weights`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute tokens [B, L] int64 -> (normalised hidden states [B, L, M], summed load-balancing loss)."""
        angles = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None, None] * rope_frequencies(self.shape)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(tokens)
        total = torch.zeros(())
        for layer in self.layers:
            x, balance = layer(x, cos, sin)
            total = total + balance
        return self.norm(x), total

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits of hidden [rows, M] -> [rows, V] float32. Pass only the rows needed."""
        return F.linear(hidden, self.embed_tokens.weight).float()
