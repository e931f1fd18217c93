"""What a `config.json` leaves out: for every family and key, the model that transformers makes of it, or a refusal."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from protos.model.checkpoint import expected_tensors
from protos.model.config_json import load_model_spec
from protos.model.json_fields import ModelConfigError
from protos.model.spec import ModelSpec
from workers.model.rope import rope_frequencies

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16", "rope_theta": 5e5,
    "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 3, "attention_bias": True,
    "eos_token_id": 7, "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "decoder_sparse_step": 2, "mlp_only_layers": [1],
    },
    "qwen3": {},
    "qwen2": {"head_dim": 16},
    "llama": {"mlp_bias": True, "pretraining_tp": 1},
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0,
    "attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
# What says how large the model is, or cannot be told from the weights: a file without it describes no model.
REQUIRED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "moe_intermediate_size", "num_experts", "num_experts_per_tok",
}  # fmt: skip
KIND = {"rope_type", "type"}  # transformers drops the factor of settings without a kind; here that is an error


class Facts(NamedTuple):
    """What a model computes with: everything that weights and `config.json` decide together."""

    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, object]
    frequencies: list[float]
    factor: float


def ours(folder: Path) -> Facts:
    spec = load_model_spec(folder)
    settings = {"eps": spec.rms_norm_eps, "tied": spec.tie_word_embeddings, "positions": spec.max_position_embeddings}
    if spec.num_experts:
        settings |= {"top": spec.num_experts_per_tok, "norm": spec.norm_topk_prob}
    frequencies, factor = rope_frequencies(spec.rope, spec.head_dim)
    return Facts(stacked(spec), settings, frequencies.tolist(), factor)


def stacked(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of a model as transformers 5 names them: one stack of experts a layer."""
    shapes = expected_tensors(replace(spec, num_experts=1) if spec.num_experts else spec)
    count, width, hidden = spec.num_experts, spec.moe_intermediate_size, spec.hidden_size
    out = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    for layer in filter(spec.is_moe_layer, range(spec.num_hidden_layers)):
        prefix = f"model.layers.{layer}.mlp."
        out[prefix + "gate.weight"] = (count, hidden)
        out[prefix + "experts.gate_up_proj"] = (count, 2 * width, hidden)
        out[prefix + "experts.down_proj"] = (count, hidden, width)
    return out


def theirs(folder: Path) -> Facts:
    config = AutoConfig.from_pretrained(folder)
    assert config.num_attention_heads % config.num_key_value_heads == 0, "made, but computes nothing"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert all(layer.self_attn.__dict__.get("sliding_window") is None for layer in model.model.layers)
    settings = {"eps": model.model.norm.variance_epsilon, "tied": "lm_head.weight" not in shapes}
    settings |= {"positions": config.max_position_embeddings}
    if config.model_type == "qwen3_moe":
        settings |= {"top": config.num_experts_per_tok, "norm": bool(config.norm_topk_prob)}
    rotary = type(model.model.rotary_emb)(config)
    return Facts(shapes, settings, rotary.inv_freq.tolist(), rotary.attention_scaling)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def oracle(folder: Path) -> Facts | None:
    """What transformers makes of a file, None when it fails, in whatever way."""
    try:
        return theirs(folder)
    except Exception:  # noqa: BLE001 - each kind of file breaks it in its own way
        return None


def refused_or(folder: Path) -> Facts | None:
    try:
        return ours(folder)
    except ModelConfigError:
        return None


def changes_of(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every key of a config, and of the rotary settings in it."""
    nested = [(key, inner) for key, value in config.items() if isinstance(value, dict) for inner in value]
    return [*((key,) for key in config), *nested]


def without(config: dict[str, Any], path: tuple[str, ...], null: bool) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(config))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if null:
        inner[path[-1]] = None
    else:
        del inner[path[-1]]
    return changed


BASES = {
    **{family: {"model_type": family, **SIZES, **own} for family, own in FAMILIES.items()},
    "qwen3, yarn": {"model_type": "qwen3", **SIZES, "rope_scaling": YARN},
    "qwen3_moe, transformers 5": {
        "model_type": "qwen3_moe", **SIZES, **FAMILIES["qwen3_moe"], "rope_parameters": YARN | {"rope_theta": 2e5},
    },
    "llama, llama3": {"model_type": "llama", **SIZES, "rope_scaling": LLAMA3},
    "qwen2, linear": {"model_type": "qwen2", **SIZES, "head_dim": 16, "rope_scaling": {"type": "linear", "factor": 3}},
}  # fmt: skip
CASES = [(base, path, null) for base, config in BASES.items() for path in changes_of(config) for null in (False, True)]


@pytest.mark.parametrize(("base", "path", "null"), CASES, ids=str)
def test_a_key_left_out_means_what_it_means_to_transformers(
    base: str, path: tuple[str, ...], null: bool, tmp_path: Path
) -> None:
    config = BASES[base]
    folder = write(tmp_path / "changed", without(config, path, null))
    wanted = oracle(folder)
    if path[-1] in REQUIRED | KIND:
        with suppress(ModelConfigError):
            assert ours(folder) == wanted
        return
    found = ours(folder) if wanted is not None else refused_or(folder)
    if wanted is None and null:  # a null that it refuses may mean what the missing key means
        wanted = oracle(write(tmp_path / "absent", without(config, path, null=False)))
    if found is not None and wanted is not None:
        assert found == wanted


OTHER_SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"hidden_act": "swish"}),
    ("qwen3", {"rope_scaling": {}}),
    ("qwen3", {"rope_scaling": False}),
    ("qwen3", {"rope_scaling": {"rope_type": "default", "factor": 1}}),
    ("qwen3", {"rope_scaling": {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 64}}),
    ("qwen3", {"rope_scaling": YARN | {"rope_type": "default", "factor": 1, "attention_factor": None}}),
    ("qwen3", {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}}),
    ("qwen3", {"rope_scaling": YARN | {"mrope_section": [4, 6, 6], "mrope_interleaved": True}}),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": None}, "original_max_position_embeddings": 128}),
    ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 64}}),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}),
    ("qwen3", {"dtype": "half"}),
    ("qwen3", {"use_sliding_window": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}),
    ("llama", {"use_sliding_window": True}),
    ("qwen2", {"attention_bias": False}),
    ("qwen3", {"mlp_bias": True}),
    ("qwen2", {"architectures": ["Qwen2Model"]}),
    ("llama", {"layer_types": ["full_attention"] * 3}),
    ("llama", {"partial_rotary_factor": 1.0}),
]


@pytest.mark.parametrize(("base", "changes"), OTHER_SPELLINGS)
def test_another_spelling_of_the_same_model(base: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "m", BASES[base] | changes)
    assert ours(folder) == theirs(folder)


@pytest.mark.parametrize("base", BASES)
def test_whole_numbers_spelled_as_floats(base: str, tmp_path: Path) -> None:
    """transformers refuses them; as the numbers they are, they name one model only."""
    plain = write(tmp_path / "plain", BASES[base])
    floats = {key: float(value) if type(value) is int else value for key, value in BASES[base].items()}
    spelled = write(tmp_path / "floats", floats | {"eos_token_id": 7})
    assert asdict(load_model_spec(spelled)) == asdict(load_model_spec(plain))
    assert ours(plain) == theirs(plain)
