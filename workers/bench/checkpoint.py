"""Checkpoints with random weights: the built-in model, or any shape, also quantised; one file at a time in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec
from protos.model.tensor_names import EMBEDDING
from workers.bench.model import benchmark_spec

if TYPE_CHECKING:  # a bare machine has no safetensors
    from workers.quant.rewrite import Recipe

_SAME_IN_CONFIG = (  # fields of the spec that have the same name in `config.json`
    "model_type", "dtype", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_SCALE = 0.02  # of all but norms and embeddings, which are 1: so routers use all experts (`dummy_shard`)
_SPREAD = {4: 4.6, 8: 73.9}  # standard deviation of uniform codes, by bits

OnProgress = Callable[[int, int], None]  # tensors written, of all


def write_checkpoint(folder: Path, seed: int = 0, layers: int = 8) -> int:
    """Write the built-in model as a Hugging Face checkpoint in bfloat16; returns the bytes of the weights.

    Raises:
        ValueError: the folder already holds a `config.json`.
    """
    spec = benchmark_spec(layers)
    config = {name: getattr(spec, name) for name in _SAME_IN_CONFIG} | {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu", "attention_bias": False,
        "use_sliding_window": False, "rope_theta": spec.rope.theta,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return _write(folder, spec, config, None, seed)


def write_shape(
    folder: Path, shape: Path, recipe: Recipe | None, seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> int:  # fmt: skip
    """Write random weights for a `config.json`, in bfloat16 or in compressed-tensors' int4 or int8.

    Codes are random themselves: nothing is quantised, so a model that would not fit into memory or on the disk in
    bfloat16 is written as fast as the disk is. Returns the bytes of the weights.

    Args:
        shape: the folder of that `config.json`, whose other settings are kept.

    Raises:
        ModelConfigError: the shape is not supported.
        ValueError: `folder` already holds a `config.json`, the shape is quantised, or groups do not divide its inputs.
    """
    from workers.quant.rewrite import quantization_config

    spec = load_model_spec(shape)
    if spec.quant is not None:
        raise ValueError(f"--shape: {shape}: its config.json is that of a quantised model; name the plain one")
    config = json.loads((shape / "config.json").read_text(encoding="utf-8"))
    if recipe is not None:
        config["quantization_config"] = quantization_config(spec, recipe)
    return _write(folder, spec, config, recipe, seed, on_progress)


def _write(
    folder: Path, spec: ModelSpec, config: dict[str, Any], recipe: Recipe | None, seed: int,
    on_progress: OnProgress = lambda done, total: None,
) -> int:  # fmt: skip
    from protos.model.checkpoint import expected_tensors
    from workers.quant.rewrite import CheckpointWriter, check_groups, kind_of

    if (folder / "config.json").exists():
        raise ValueError(f"OUT: {folder}: already holds a config.json; name a new folder")
    shapes = expected_tensors(spec)
    if recipe is not None:
        check_groups(shapes, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    writer, generator = CheckpointWriter(folder), torch.Generator().manual_seed(seed)
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        if recipe is not None and kind_of(name) in recipe.kinds:
            parts = _packed(name, shape, recipe, generator)
        else:
            parts = _plain(name, shape, generator)
        for part, tensor in parts:
            writer.add(part, tensor)
        on_progress(done, len(shapes))
    size = writer.close()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return size


def _plain(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    if name.endswith("norm.weight"):
        yield name, torch.ones(shape, dtype=torch.bfloat16)
    else:
        scale = 1.0 if name == EMBEDDING else _SCALE
        yield name, torch.randn(shape, generator=generator).mul_(scale).bfloat16()


def _packed(
    name: str, shape: tuple[int, ...], recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the format pack-quantized for a matrix of random codes."""
    rows, columns = shape
    words = (rows, -(-columns * recipe.bits // 32))
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    stem = name.removesuffix("weight")
    yield stem + "weight_packed", torch.randint(low, high, words, generator=generator, dtype=torch.int32)
    scale = torch.full((rows, columns // recipe.group), _SCALE / _SPREAD[recipe.bits], dtype=torch.bfloat16)
    yield stem + "weight_scale", scale
    yield stem + "weight_shape", torch.tensor([rows, columns], dtype=torch.int64)
