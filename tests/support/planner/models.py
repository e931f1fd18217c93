"""Models and files of plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config.deployment import Deployment
from cluster.planner.subject import load_subject

QWEN3_30B_A3B: dict[str, Any] = {  # what its config.json says of shapes
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "max_position_embeddings": 262144, "rope_theta": 10_000_000, "torch_dtype": "bfloat16", "eos_token_id": 151645,
    "tie_word_embeddings": False,
}  # fmt: skip

QWEN3_235B_A22B: dict[str, Any] = {  # as published
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 94,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_CODER_30B_A3B: dict[str, Any] = QWEN3_30B_A3B | {
    "intermediate_size": 5472, "max_window_layers": 28, "norm_topk_prob": True, "qkv_bias": False,
    "rope_scaling": None, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "use_sliding_window": False,
    "sliding_window": None, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
QWEN25_7B_1M: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "dual_chunk_attention_config": {
        "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144,
    },
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 1010000, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_theta": 10000000.0,
    "sliding_window": 1010000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip


def config_json(folder: Path, **changes: object) -> Path:
    """Write the config.json of Qwen3-30B-A3B with changes; returns its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(QWEN3_30B_A3B | changes))
    return path


def subject(folder: Path, device: str = "cuda", **changes: object) -> Deployment:
    return load_subject(config_json(folder, **changes), device)
