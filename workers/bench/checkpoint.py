"""Write the built-in benchmark model as a Hugging Face checkpoint, so that other engines can run the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from workers.bench.model import benchmark_spec

_SCALE = 0.02


def write_checkpoint(folder: Path, seed: int = 0, layers: int = 8) -> int:
    """Write random bfloat16 weights (normal, scale 0.02; norms 1) and `config.json`; returns the bytes of the weights.

    Raises:
        ValueError: the folder already holds a `config.json`.
    """
    from safetensors.torch import save_file

    from protos.model.checkpoint import expected_tensors

    if (folder / "config.json").exists():
        raise ValueError(f"OUT: {folder}: already holds a config.json; name a new folder")
    spec = benchmark_spec(layers)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(spec).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.randn(shape, generator=generator).mul_(_SCALE).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": spec.model_type, "dtype": spec.dtype,
        "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers, "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads, "head_dim": spec.head_dim, "hidden_act": "silu",
        "num_experts": spec.num_experts, "num_experts_per_tok": spec.num_experts_per_tok,
        "moe_intermediate_size": spec.moe_intermediate_size, "norm_topk_prob": spec.norm_topk_prob,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "tie_word_embeddings": False,
        "max_position_embeddings": spec.max_position_embeddings, "rope_theta": spec.rope.theta,
        "rms_norm_eps": spec.rms_norm_eps, "use_sliding_window": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
