"""The settings of a GGUF file as those of `config.json`, which then are checked as any other.

Keys of an architecture that are neither used nor known to change nothing are refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protos.model.files import AGAIN, open_regular
from protos.model.gguf.file import GgufFile, read_gguf

ARCHITECTURES: Mapping[str, tuple[str, str]] = {  # GGUF's name: model_type, class
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
}
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3.1: its rotary settings as one factor a pair
# tokens that end an answer beside the one that the file names: what llama.cpp ends at, for these architectures
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>")
_CONTROL = 3  # in tokenizer.ggml.token_type
_USED = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scale_linear", "expert_count", "expert_used_count", "expert_feed_forward_length",
}  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...] | None] = {  # key: values that change nothing; None: any
    "vocab_size": None, "rope.scaling.finetuned": None, "tensor_data_layout": None, "attention.causal": (True,),
    "use_parallel_residual": (False, True), "expert_shared_count": (0,), "expert_shared_feed_forward_length": None,
    "expert_weights_scale": (0.0, 1.0), "expert_weights_norm": (True,), "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1), "expert_group_used_count": (0, 1), "leading_dense_block_count": (0,),
    "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "rope.scaling.yarn_log_multiplier": (0.0,), "logit_scale": (0.0, 1.0),
    "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,),
    "nextn_predict_layers": (0,),
}  # fmt: skip
_THETA = 10_000.0  # where a file does not say
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(path: Path) -> dict[str, object]:
    """Return `config_of` a file, with the rotary settings that are stored as a tensor. Raises GgufError."""
    file = read_gguf(path)
    config = config_of(file)
    if (tensor := file.tensors.get(ROPE_FACTORS)) is not None:
        if tensor.kind.name != "F32" or len(tensor.shape) != 1:
            raise file.error(
                ROPE_FACTORS, f"type {tensor.kind.name}, shape {list(tensor.shape)}: must be an F32 vector"
            )
        with open_regular(path) as handle:
            handle.seek(tensor.start)
            factors = struct.unpack(f"<{tensor.shape[0]}f", handle.read(tensor.num_bytes))
        theta, head_dim = config.get("rope_theta", _THETA), config.get("head_dim")
        if not isinstance(theta, float) or not isinstance(head_dim, int) or 2 * len(factors) != head_dim:
            raise file.error(ROPE_FACTORS, f"{len(factors)} factors: must be half the width of a head: {AGAIN}")
        config["rope_scaling"] = _llama3_rope(file, theta, head_dim, factors)
    return config


def config_of(file: GgufFile) -> dict[str, object]:
    """Return the content of a `config.json` that describes the model of a file.

    Raises GgufError: the architecture or a setting is not one that is read.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise file.error("general.architecture", f"{name or 'missing'}: supported are {', '.join(ARCHITECTURES)}")
    own = {key[len(name) + 1 :]: value for key, value in file.settings.items() if key.startswith(f"{name}.")}
    _refuse_unknown(file, name, own)
    model_type, architecture = ARCHITECTURES[name]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.error("token_embd.weight", "missing: the file holds no weights of a model: name another")
    config: dict[str, object] = {
        "model_type": model_type, "architectures": [architecture], "vocab_size": embedding.shape[0],
        "hidden_size": own.get("embedding_length"), "num_hidden_layers": own.get("block_count"),
        "num_attention_heads": own.get("attention.head_count"),
        "num_key_value_heads": own.get("attention.head_count_kv", own.get("attention.head_count")),
        "intermediate_size": own.get("feed_forward_length"), "max_position_embeddings": own.get("context_length"),
        "rms_norm_eps": _decimal(own.get("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors, "head_dim": _head_dim(file, name, own),
        "dtype": "float32" if _is_wide(file) else "bfloat16", "use_sliding_window": False,
        "eos_token_id": _ends(file, embedding.shape[0]), "rope_theta": _decimal(own.get("rope.freq_base")),
        "rope_scaling": _rope(file, own), "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }  # fmt: skip
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if model_type == "qwen3_moe":
        config |= _experts(own)
    if any(tensor.kind.elements > 1 for tensor in file.tensors.values()):
        config["quantization_config"] = _quantization(file)
    return {key: value for key, value in config.items() if value is not None}


def _refuse_unknown(file: GgufFile, name: str, own: Mapping[str, Any]) -> None:
    for key, value in own.items():
        neutral = _NEUTRAL.get(key, ())
        if key in _USED or neutral is None or value in neutral:
            continue
        allowed = f"must be {' or '.join(map(str, neutral))}" if neutral else "a setting that is not read"
        raise file.error(f"{name}.{key}", f"{str(value)[:80]}: {allowed}: use a file of another model")
    if name != "qwen3moe" and own.get("expert_count"):
        raise file.error(f"{name}.expert_count", f"{own['expert_count']}: experts are read of qwen3moe only")
    window, context = own.get("attention.sliding_window"), own.get("context_length", 0)
    if window and window < context:
        raise file.error(f"{name}.attention.sliding_window", f"{window}: sliding window attention is not computed")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(own.get(key), list):
            raise file.error(f"{name}.{key}", "differs by layer: all layers must have one size")


def _head_dim(file: GgufFile, name: str, own: Mapping[str, Any]) -> int | None:
    hidden, heads = own.get("embedding_length"), own.get("attention.head_count")
    if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
        return None  # the check of config.json names what is missing
    head_dim = own.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise file.error(f"{name}.{key}", f"{own[key]}: must be {head_dim}, the width of a head")
    return int(head_dim)


def _rope(file: GgufFile, own: Mapping[str, Any]) -> dict[str, object] | None:
    kind = own.get("rope.scaling.type", "linear" if own.get("rope.scale_linear", 1.0) != 1.0 else "none")
    factor = _decimal(own.get("rope.scaling.factor", own.get("rope.scale_linear")))
    if ROPE_FACTORS in file.tensors:
        return {"rope_type": "llama3"}  # completed by `read_config`
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise file.error("rope.scaling.type", f"{kind}: must be none, linear or yarn")
    rope = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": own.get("rope.scaling.original_context_length"),
            "beta_fast": _decimal(own.get("rope.scaling.yarn_beta_fast")),
            "beta_slow": _decimal(own.get("rope.scaling.yarn_beta_slow")),
        }
    return {key: value for key, value in rope.items() if value is not None}


def _llama3_rope(file: GgufFile, theta: float, head_dim: int, factors: Sequence[float]) -> dict[str, object]:
    """Return the settings `llama3` whose factors are these, one a pair of a head.

    Only the band that all of Meta's models have is looked for. Raises GgufError for other factors.
    """
    factor = float(max(factors))
    original, low, high = (float(_LLAMA3[key]) for key in (
        "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
    ))  # fmt: skip
    for index, given in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        expected = 1 / ((1 - smooth) / factor + smooth)
        expected = 1.0 if wavelength < original / high else factor if wavelength > original / low else expected
        if abs(given - expected) > 1e-4 * expected:
            raise file.error(ROPE_FACTORS, "not those of Llama 3.1 or 3.2: use a file of another model")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _experts(own: Mapping[str, Any]) -> dict[str, object]:
    return {
        "num_experts": own.get("expert_count"), "num_experts_per_tok": own.get("expert_used_count"),
        "moe_intermediate_size": own.get("expert_feed_forward_length"),
        "norm_topk_prob": True,  # of every qwen3moe file: the format has no key for it
        "decoder_sparse_step": 1,  # nor for layers without experts
        "intermediate_size": own.get("feed_forward_length") or own.get("expert_feed_forward_length"),
    }  # fmt: skip


def _ends(file: GgufFile, vocab: int) -> list[int]:
    settings = file.settings
    named = [settings.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens, kinds = settings.get("tokenizer.ggml.tokens", []), settings.get("tokenizer.ggml.token_type", [])
    named += [
        i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL and token in _ENDS
    ]
    return list(dict.fromkeys(i for i in named if i is not None and i < vocab))


def _is_wide(file: GgufFile) -> bool:
    """Return whether every matrix is stored in float32."""
    return all(each.kind.name == "F32" for each in file.tensors.values() if len(each.shape) > 1)


def _quantization(file: GgufFile) -> dict[str, object]:
    """Return the bytes in memory of a weight of the products of all layers, and of one of the tables."""
    tables, products = [0.0, 0], [0.0, 0]
    for name, tensor in file.tensors.items():
        if len(tensor.shape) < 2 or "ffn_gate_inp" in name:
            continue
        group, values = products if name.startswith("blk.") else tables, math.prod(tensor.shape)
        group[0] += values * tensor.kind.memory
        group[1] += values
    means = [total / count if count else 2.0 for total, count in (products, tables)]
    return {"quant_method": "gguf", "mean_bytes": means[0], "table_bytes": means[1]}


def _decimal(value: Any) -> Any:
    """Return the number that a float32 was made from: 1e-06, not 9.999999974752427e-07."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
