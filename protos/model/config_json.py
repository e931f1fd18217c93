"""`config.json` and `generation_config.json` of a Hugging Face checkpoint, or a GGUF file, as a `ModelSpec`.

Both spellings are read: the old one (`rope_theta`, `rope_scaling`, `num_experts`) and that of transformers 5
(`rope_parameters`, `num_local_experts`). What would silently change the output is refused by name, never guessed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from protos.model.files import is_gguf
from protos.model.folder import explain
from protos.model.gguf.config import read_config
from protos.model.json_fields import MAX_POSITIONS, Fields, ModelConfigError, read_json
from protos.model.long_context import SECTION as LONG_CONTEXT
from protos.model.long_context import dual_chunk_spec, sparse_spec
from protos.model.quant.config import quant_scheme
from protos.model.rope_json import refuse_partial_rotary, rope_spec
from protos.model.spec import ModelSpec

DTYPES = ("bfloat16", "float16", "float32")
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # torch's other names
_SILU = ("silu", "swish")  # one function
_DEFAULT_EPS = 1e-6  # of every family
_MAX_LAYERS, _MAX_HEADS = 1000, 4096  # of one layer; the largest published models have 126 layers and 128 heads
_MAX_WINDOW_LAYERS = 28  # from which layer on `use_sliding_window` applies, where the file does not say


@dataclass(frozen=True, slots=True)
class _Family:
    """What a `model_type` fixes without saying so in `config.json` (defaults as in transformers).

    What the weights are measured by (widths, counts) has no default here: a file without it describes no model.
    """

    architecture: str
    positions: int  # max_position_embeddings
    kv_heads: int | None = None  # None: as many as query heads
    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: `attention_bias` decides, for q, k, v and o
    moe: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    window: str = "layers"  # layers: `use_sliding_window` from `max_window_layers` on; all: on every layer; none: never


_FAMILIES = {
    "qwen3_moe": _Family("Qwen3Moe", 32768, kv_heads=4, qk_norm=True, moe=True, window="all"),
    "qwen3": _Family("Qwen3", 32768, kv_heads=32, qk_norm=True, head_dim=128),
    "qwen2": _Family("Qwen2", 32768, kv_heads=32, qkv_bias=True),
    "llama": _Family("Llama", 2048, window="none"),
}


_WITH_IMAGES = {  # models of images and text, of which the language model is read: class, family
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen3"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "qwen3_moe"),
}
_OF_WHOLE_MODEL = ("quantization_config", "dtype", "torch_dtype", "eos_token_id", LONG_CONTEXT)
_IMAGES_THETA = 500_000.0  # of these models, where the file does not say


def load_model_spec(
    model_dir: Path, rope_scaling: Mapping[str, object] | None = None, *, config_file: str = "config.json",
    dual_chunk: Mapping[str, object] | None = None, sparse: Mapping[str, object] | None = None,
) -> ModelSpec:  # fmt: skip
    """Return the architecture of the checkpoint in `model_dir`, which may be a GGUF file.

    Args:
        rope_scaling: replaces the rope settings of the file (`rope_theta` stays unless given here).
        config_file: name of the file to read instead of `config.json`, such as the `config_1m.json` of long models.
        dual_chunk, sparse: settings that go before those of the file (see `protos.model.long_context`).

    Raises ModelConfigError: a file is missing or malformed, or the model is not one the decoder computes.
    """
    config = _text_part(_read_config(Path(model_dir), config_file))
    model_type, family = _family(config)
    layers, hidden = config.integer("num_hidden_layers", high=_MAX_LAYERS), config.integer("hidden_size")
    _refuse_unsupported(config, family, layers)
    heads = config.integer("num_attention_heads", high=_MAX_HEADS)
    kv_heads = _kv_heads(config, family, heads)
    attention_bias = config.boolean("attention_bias", default=False)
    vocab = config.integer("vocab_size")
    positions = config.integer("max_position_embeddings", default=family.positions, high=MAX_POSITIONS)
    plain = ModelSpec(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(config, family, hidden, heads),
        intermediate_size=config.integer("intermediate_size"),
        rms_norm_eps=config.number("rms_norm_eps", default=_DEFAULT_EPS, above=0.0, at_most=1.0),
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=config.boolean("mlp_bias", default=False) if model_type == "llama" else False,
        qk_norm=family.qk_norm,
        rope=rope_spec(config, positions, rope_scaling),
        max_position_embeddings=positions,
        dtype=_dtype(config),
        eos_token_ids=_eos(Path(model_dir), config, vocab),
        quant=quant_scheme(config),
        **(_experts(config, layers) if family.moe else {}),  # type: ignore[arg-type]
    )
    return replace(
        plain,
        dual_chunk=dual_chunk_spec(config, dual_chunk, plain),
        sparse=sparse_spec(config, sparse, plain, Path(model_dir)),
    )


def _read_config(model_dir: Path, config_file: str) -> Fields:
    if is_gguf(model_dir):
        return Fields(str(model_dir), read_config(model_dir))
    try:
        return read_json(model_dir / config_file)
    except ModelConfigError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise ModelConfigError(f"{error}: {explain(model_dir)}") from error
        raise


def _text_part(config: Fields) -> Fields:
    """Return the settings of the language model in a model of images and text, any other model's as they are.

    What the vision part adds between layers is zero for text, and positions of text are equal on all axes.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _WITH_IMAGES:
        return config
    name, family = _WITH_IMAGES[model_type]
    architectures = config.get("architectures") or [name]
    if not isinstance(architectures, list) or name not in architectures:
        raise config.error("architectures", architectures, f"{model_type} must be {name}")
    text = config.section("text_config", "must be an object: the settings of the language model")
    if not text.values:
        raise config.missing("text_config", "must be an object: the settings of the language model")
    whole = {key: config.get(key) for key in _OF_WHOLE_MODEL if config.get(key) is not None}
    fixed: dict[str, object] = {
        "model_type": family, "architectures": [f"{_FAMILIES[family].architecture}ForCausalLM"],
        "tie_word_embeddings": config.get("tie_word_embeddings") or False, "norm_topk_prob": True,
    }  # fmt: skip
    return Fields(text.source, {"rope_theta": _IMAGES_THETA, **text.values, **whole, **fixed})


def _family(config: Fields) -> tuple[str, _Family]:
    supported = f"supported are {', '.join(_FAMILIES)}, and the text of {', '.join(_WITH_IMAGES)}"
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise config.error("architectures", architectures, "must be a list of class names")
    model_type = config.get("model_type")
    if model_type is None and architectures:
        model_type = next((name for name, family in _FAMILIES.items() if _is_of(family, architectures)), None)
        if model_type is None:
            raise config.error("architectures", architectures, supported)
    if model_type is None:
        raise config.missing("model_type", supported)
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise config.error("model_type", model_type, supported)
    if architectures and not _is_of(family, architectures):
        raise config.error("architectures", architectures, f"{model_type} must be {family.architecture}ForCausalLM")
    return str(model_type), family


def _is_of(family: _Family, architectures: list[str]) -> bool:
    """Return whether one of the class names is the family's language model; its base model has the same tensors."""
    return any(f"{family.architecture}{kind}" in architectures for kind in ("ForCausalLM", "Model"))


def _refuse_unsupported(config: Fields, family: _Family, layers: int) -> None:
    if config.get("hidden_act") not in (None, *_SILU):
        raise config.error("hidden_act", config.get("hidden_act"), "only silu (swish) is computed")
    if config.boolean("use_sliding_window", default=False) and _has_window(config, family, layers):
        raise config.error("use_sliding_window", True, "sliding window attention is not computed; must be false")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise config.error("layer_types", kinds, "every layer must be full_attention")
    for key in ("text_config", "per_layer_config"):
        if config.get(key):
            raise config.error(key, config.get(key), "settings of a part of the model are not read; use a text model")
    refuse_partial_rotary(config)


def _has_window(config: Fields, family: _Family, layers: int) -> bool:
    """Return whether transformers computes a sliding window in some layer of a model that says `use_sliding_window`."""
    if family.window == "none" or ("sliding_window" in config.values and config.get("sliding_window") is None):
        return False
    return family.window == "all" or config.integer("max_window_layers", default=_MAX_WINDOW_LAYERS, low=0) < layers


def _kv_heads(config: Fields, family: _Family, heads: int) -> int:
    """Return the KV heads: null means as many as query heads, a missing key the family's number where that divides."""
    is_absent = "num_key_value_heads" not in config.values
    usual = family.kv_heads if is_absent and family.kv_heads and heads % family.kv_heads == 0 else heads
    kv_heads = config.integer("num_key_value_heads", default=usual)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", kv_heads, f"must divide num_attention_heads ({heads})")
    return kv_heads


def _head_dim(config: Fields, family: _Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise config.error("num_attention_heads", heads, f"must divide hidden_size ({hidden}) as head_dim is not given")
    head_dim = config.integer("head_dim", default=family.head_dim or hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", head_dim, "must be even, as rotary embedding turns pairs")
    return head_dim


def _experts(config: Fields, layers: int) -> dict[str, object]:
    spellings = [key for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    experts = config.integer(spellings[0] if spellings else "num_experts")
    if len(spellings) == 2 and config.get("num_local_experts") != experts:
        raise config.error("num_local_experts", config.get("num_local_experts"), f"must equal num_experts ({experts})")
    dense = config.get("mlp_only_layers") or []
    fits = isinstance(dense, list) and len(dense) <= layers
    if not isinstance(dense, list) or not fits or not all(type(one) is int and 0 <= one < layers for one in dense):
        raise config.error("mlp_only_layers", dense, f"must be a list of layers from 0 to {layers - 1}")
    return {
        "num_experts": experts,
        "num_experts_per_tok": config.integer("num_experts_per_tok", high=experts),
        "moe_intermediate_size": config.integer("moe_intermediate_size"),
        "norm_topk_prob": config.boolean("norm_topk_prob", default=False),
        "decoder_sparse_step": config.integer("decoder_sparse_step", default=1),
        "mlp_only_layers": tuple(dense),
    }


def _dtype(config: Fields) -> str:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    name = "float32" if value is None else str(value).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise config.error(key, value, f"must be one of {', '.join(DTYPES)}")
    return name


def _eos(model_dir: Path, config: Fields, vocab: int) -> tuple[int, ...]:
    """Return the ids that end a generation: of `generation_config.json`, else of `config.json`, else none."""
    fields, generation = config, model_dir / "generation_config.json"
    if os.path.lexists(generation) and (read := read_json(generation)).get("eos_token_id") is not None:
        fields = read
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < vocab for token in ids):
        raise fields.error("eos_token_id", value, f"must be a token id, or a list of them, from 0 to {vocab - 1}")
    return tuple(ids)
