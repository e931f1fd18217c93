"""GGUF files made from tiny Hugging Face checkpoints by the reference library, and tensors of random blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Tokenizer

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama"}
_SCALES = {  # offset of every float16 in a block; the other bytes may be anything
    Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q5_0: [0], Kind.Q5_1: [0, 2], Kind.Q8_0: [0], Kind.Q4_K: [0, 2],
    Kind.Q5_K: [0, 2], Kind.Q6_K: [208],
}  # fmt: skip


def random_blocks(kind: Kind, shape: tuple[int, ...], seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """Return the bytes `[..., rows, row bytes]` of a tensor of random blocks; scales have both signs."""
    generator = np.random.default_rng(seed)
    if kind not in _SCALES:
        values = generator.normal(0, scale, shape).astype(np.float32)
        return gguf.quantize(values, kind).view(np.uint8)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=np.uint8)
    for offset in _SCALES[kind]:
        values = generator.normal(0, scale, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_tensors(path: Path, tensors: Mapping[str, tuple[Kind, np.ndarray]], architecture: str = "llama") -> Path:
    """Write a file of tensors given as their bytes, without a model's settings."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    return _close(writer, path)


def convert(
    folder: Path, path: Path, kind_of: Callable[[str], Kind] = lambda name: Kind.F32,
    settings: Mapping[str, Any] | None = None, leave_out: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Write a checkpoint as a GGUF file, as llama.cpp's converter does.

    Args:
        kind_of: the type of a matrix, by its name in the file.
        settings: further keys, which go before those of the checkpoint.
        leave_out: keys that the file does not have.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    for key, value in (_settings(writer.arch, config) | dict(settings or {})).items():
        if key not in leave_out:
            _add(writer, key, value)
    stored = {name: values.float().numpy() for name, values in load_file(folder / "model.safetensors").items()}
    for name, values in _tensors(writer.arch, config, stored).items():
        kind = kind_of(name) if values.ndim > 1 else Kind.F32
        data = values if kind == Kind.F32 else gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    return _close(writer, path)


def _settings(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"], "rope.freq_base": float(rope.get("rope_theta", 1e4)),
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }  # fmt: skip
    if head_dim := config.get("head_dim"):
        settings |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if "num_experts_per_tok" in config:
        settings |= {
            "expert_count": config.get("num_experts", config.get("num_local_experts")),
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    if (kind := rope.get("rope_type", "default")) in ("yarn", "linear"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        settings["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{arch}.{key}": value for key, value in settings.items()}


def _tensors(arch: str, config: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    tensors, experts = {}, {}
    for name, values in stored.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = values
        else:
            tensors[name] = values
    tensors |= {name: np.stack([each[i] for i in sorted(each)]) for name, each in experts.items()}
    if arch == "llama":
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        for name in tensors:
            if re.search(r"[qk]_proj\.(weight|bias)$", name):
                tensors[name] = _permuted(tensors[name], heads if "q_proj" in name else kv_heads)
    found = {names.get_name(name, (".weight", ".bias")): values for name, values in tensors.items()}
    assert None not in found, sorted(tensors)
    return found


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Return rows as llama.cpp's converter orders them: `LlamaModel.permute` of convert_hf_to_gguf.py."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_settings(path: Path, settings: Mapping[str, Any], architecture: str = "qwen2") -> Path:
    """Write a file without tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        _add(writer, key, value)
    return _close(writer, path)


def tokenizer_settings(tokenizer: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """Return the keys for a byte-level tokenizer; `more` goes below `tokenizer.ggml`."""
    layout = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    kinds = [1 if i not in added else 3 if added[i].special else 4 for i in range(size)]
    settings = {
        "model": "gpt2", "pre": pre, "tokens": [tokenizer.id_to_token(i) for i in range(size)], "token_type": kinds,
        "merges": [" ".join(pair) for pair in layout["model"]["merges"]],
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (settings | more).items()}
