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


def config_json(folder: Path, **changes: object) -> Path:
    """Write the config.json of Qwen3-30B-A3B with changes; returns its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(QWEN3_30B_A3B | changes))
    return path


def subject(folder: Path, device: str = "cuda", **changes: object) -> Deployment:
    return load_subject(config_json(folder, **changes), device)
