"""Tiny random checkpoints of every family, written by transformers' own `save_pretrained`.

Weights are large enough that routing, attention and the next token are decided clearly; norms and biases are random
too, so that a forgotten one shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.support.paths import ROOT

NEEDLE = ROOT / "configs" / "needle"

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# What each model differs in; vocabularies that are primes divide by no number of ranks.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _MOE,
    "qwen3_moe_raw": _MOE | {"norm_topk_prob": False, "attention_bias": True, "vocab_size": 131},
    "qwen3_moe_dense_layer": _MOE | {"mlp_only_layers": [1], "tie_word_embeddings": True},
    "qwen3_moe_step2": _MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False},
    "qwen3_moe_yarn": _MOE | {"rope_parameters": _YARN, "max_position_embeddings": 64},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "vocab_size": 509},
    "qwen3_tied": {"model_type": "qwen3", "tie_word_embeddings": True, "vocab_size": 131},
    "qwen3_yarn": {"model_type": "qwen3", "max_position_embeddings": 256,
                   "rope_parameters": _YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3}},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama": {"model_type": "llama"},
    "llama_bias_llama3": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    "llama_linear": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True,
                     "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
}  # fmt: skip


IMAGE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {},
    "qwen3_vl_moe": {key: value for key, value in _MOE.items() if key != "model_type"},
}  # fmt: skip
_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
}  # fmt: skip


def make_checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    """Write the checkpoint of `family` (a key of FAMILIES), its config changed by `changes`, and return its folder."""
    config = AutoConfig.for_model(**_SIZES | FAMILIES[family] | changes)
    return _save_random(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder)


def make_image_checkpoint(folder: Path, family: str) -> Path:
    """Write a checkpoint of images and text around the language model of `family` (a key of IMAGE_FAMILIES)."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    of_text = {key: value for key, value in _SIZES.items() if key not in ("tie_word_embeddings",)}
    config = AutoConfig.for_model(
        family, text_config=of_text | IMAGE_FAMILIES[family] | {"rope_parameters": rope}, vision_config=_VISION,
        tie_word_embeddings=False, image_token_id=250, video_token_id=251, vision_start_token_id=252,
        vision_end_token_id=253,
    )  # fmt: skip
    return _save_random(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), folder)


def _save_random(model: Any, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(20)

    def normal(parameter: torch.Tensor, mean: float, std: float) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                normal(parameter, 1.0, 0.2)
            elif "embed_tokens" in name:
                normal(parameter, 0.0, 0.3)
            else:
                normal(parameter, 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def respell(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose `config.json` uses the keys of transformers 4: `rope_theta`, `rope_scaling`, ..."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def saved_by_transformers(source: Path, folder: Path, rope: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint read and written again by transformers, with other rope settings when `rope` is given."""
    config = AutoConfig.from_pretrained(source)
    if rope is not None:
        config.rope_parameters = dict(rope)
    AutoModelForCausalLM.from_pretrained(source, config=config, dtype="auto").save_pretrained(folder)
    return folder
