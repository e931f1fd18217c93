"""The architecture of a checkpoint, read from its `config.json`. Pure Python: both planes use it.

Legend of the sizes: `H` query heads, `K` KV heads, `D` head dim, `M` hidden size, `E` experts, `I` intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. `kind` is one of default, yarn, linear, llama3 (the `rope_type` of config.json)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # 0 for kind "default" and "linear"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only transformer; every family the decoder knows is a value of these fields."""

    model_type: str  # qwen3_moe, qwen3, qwen2, llama
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec
    max_position_embeddings: int
    dtype: str  # of the stored weights: bfloat16, float16, float32
    eos_token_ids: tuple[int, ...]
    num_experts: int = 0  # 0: dense model
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts (Qwen3-MoE: `mlp_only_layers`, `decoder_sparse_step`)."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def max_context(self) -> int:
        """The context length, in tokens, that the positions cover."""
        if self.rope.kind == "yarn":
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        if self.rope.kind == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings
