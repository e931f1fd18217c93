"""The architecture of a checkpoint as plain values; head and stages share it.

Legend of the sizes: `H` query heads, `K` KV heads, `D` head dim, `M` hidden size, `E` experts, `I` intermediate.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from protos.model.json_fields import MAX_POSITIONS
from protos.model.quant.scheme import QuantScheme


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
class DualChunkSpec:
    """Dual chunk attention (arXiv 2402.17463). `original_max_position_embeddings == 0`: no length scaling."""

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0

    @property
    def distance(self) -> int:
        """Tokens between the starts of two chunks."""
        return self.chunk_size - self.local_size

    def length_scale(self, length: int) -> float:
        """Return `s(n)` of a prompt of `length` tokens; logits are multiplied by its square."""
        if self.original_max_position_embeddings <= 0:
            return 1.0
        return max(1.0, 0.1 * math.log(length / self.original_max_position_embeddings) + 1.0)


@dataclass(frozen=True, slots=True)
class HeadBudget:
    """The published pattern of one head; forced columns and offsets count inside the two numbers."""

    n_vertical: int
    n_slash: int


@dataclass(frozen=True, slots=True)
class SparseSpec:
    """Vertical-slash prefill (arXiv 2407.02490): active for rows of a prompt longer than `threshold` tokens.

    Budgets, in this order: `patterns[layer][head]` (None there: that head is dense), else `uniform` for every head,
    else adaptive: columns and offsets are added until `target_recall` of the estimate is kept.
    """

    threshold: int = 32768
    last_q: int = 64  # rows at the end of a cell that the estimate looks at
    cell: int = 8192  # tokens of a cell of the absolute grid
    patterns: tuple[tuple[HeadBudget | None, ...], ...] | None = None
    uniform: HeadBudget | None = None
    target_recall: float = 0.95
    recall_floor: float = 0.0  # held-out recall below it turns a head's cell dense; 0: off
    max_dense_share: float = 1.0  # most head-cells of a layer and prompt that may turn dense
    synthetic: bool = False  # benchmarks on random weights: compute the estimate, select a fixed pattern

    @property
    def is_adaptive(self) -> bool:
        """Whether every head gets as many columns and offsets as the recall needs."""
        return self.patterns is None and self.uniform is None


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
    dual_chunk: DualChunkSpec | None = None
    sparse: SparseSpec | None = None  # None: every row is dense
    quant: QuantScheme | None = None  # None: all weights are stored plain

    @property
    def chunk_distance(self) -> int:
        """Tokens between the starts of two DCA chunks; 0: plain attention, one infinite chunk."""
        return self.dual_chunk.distance if self.dual_chunk else 0

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether `layer` has experts (Qwen3-MoE: `mlp_only_layers`, `decoder_sparse_step`)."""
        has_turn = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and has_turn and layer not in self.mlp_only_layers

    @property
    def max_context(self) -> int:
        """The context length, in tokens, that the positions cover; dual chunk attention sets no bound."""
        if self.dual_chunk is not None:
            return MAX_POSITIONS
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))
        if self.rope.kind == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @property
    def default_context(self) -> int:
        """The context length, in tokens, of a deployment that names none."""
        if self.dual_chunk is None:
            return self.max_context
        chunk = self.dual_chunk.chunk_size
        return self.max_position_embeddings if self.max_position_embeddings > chunk else 4 * chunk

    def to_json(self) -> str:
        """Return the spec as JSON, for stages and other processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Return the spec that `to_json` wrote. Raises ValueError for anything else."""
        from pydantic import TypeAdapter  # here: kernels are measured on machines with torch and numpy alone

        spec = TypeAdapter(cls).validate_json(text)
        if json.loads(spec.to_json()) != json.loads(text):
            raise ValueError("not the spec of a model, as this build writes it")
        return spec
