"""`config.json` and `generation_config.json` of a Hugging Face checkpoint as a `ModelSpec`.

Both spellings are read: the old one (`rope_theta`, `rope_scaling`, `num_experts`) and that of transformers 5
(`rope_parameters`, `num_local_experts`). What would silently change the output is refused by name, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from protos.model.json_fields import MAX_POSITIONS, Fields, read_json
from protos.model.long_context import dual_chunk_spec, sparse_spec
from protos.model.spec import ModelSpec, RopeSpec

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class _Family:
    """What a `model_type` fixes without saying so in `config.json` (defaults as in transformers)."""

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: `attention_bias` decides, for q, k, v and o
    moe: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_theta: float | None = None  # None: must be given


_FAMILIES = {
    "qwen3_moe": _Family("Qwen3MoeForCausalLM", qk_norm=True, moe=True),
    "qwen3": _Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True),
    "llama": _Family("LlamaForCausalLM", rope_theta=10000.0),
}

# Keys each kind reads; any other key would be ignored by the arithmetic and is refused.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
_ROPE_BANDS: Mapping[str, Mapping[str, float | None]] = {  # ends of the blended band, the lower one first; usual values
    "yarn": {"beta_slow": 1.0, "beta_fast": 32.0}, "llama3": {"low_freq_factor": None, "high_freq_factor": None},
}  # fmt: skip
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def load_model_spec(
    model_dir: Path, rope_scaling: Mapping[str, object] | None = None, *, config_file: str = "config.json",
    dual_chunk: Mapping[str, object] | None = None, sparse: Mapping[str, object] | None = None,
) -> ModelSpec:  # fmt: skip
    """Return the architecture of the checkpoint in `model_dir`.

    Args:
        rope_scaling: replaces the rope settings of the file (`rope_theta` stays unless given here).
        config_file: name of the file to read instead of `config.json`, such as the `config_1m.json` of long models.
        dual_chunk, sparse: settings that go before those of the file (see `protos.model.long_context`).

    Raises ModelConfigError: a file is missing or malformed, or the model is not one the decoder computes.
    """
    config = read_json(Path(model_dir) / config_file)
    model_type, family = _family(config)
    _refuse_unsupported(config)
    layers, hidden = config.integer("num_hidden_layers", high=10_000), config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", kv_heads, f"must divide num_attention_heads ({heads})")
    attention_bias = config.boolean("attention_bias", default=False)
    vocab, positions = config.integer("vocab_size"), config.integer("max_position_embeddings", high=MAX_POSITIONS)
    plain = ModelSpec(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(config, family, hidden, heads),
        intermediate_size=config.integer("intermediate_size"),
        rms_norm_eps=config.number("rms_norm_eps", above=0.0, at_most=1.0),
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=config.boolean("mlp_bias", default=False) if model_type == "llama" else False,
        qk_norm=family.qk_norm,
        rope=_rope(config, family, positions, rope_scaling),
        max_position_embeddings=positions,
        dtype=_dtype(config),
        eos_token_ids=_eos(Path(model_dir), config, vocab),
        **(_experts(config, layers) if family.moe else {}),  # type: ignore[arg-type]
    )
    return replace(
        plain, dual_chunk=dual_chunk_spec(config, dual_chunk, plain), sparse=sparse_spec(config, sparse, plain)
    )


def _family(config: Fields) -> tuple[str, _Family]:
    supported = f"supported are {', '.join(_FAMILIES)}"
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise config.error("architectures", architectures, "must be a list of class names")
    model_type = config.get("model_type")
    if model_type is None and architectures:
        model_type = next((name for name, family in _FAMILIES.items() if family.architecture in architectures), None)
        if model_type is None:
            raise config.error("architectures", architectures, supported)
    if model_type is None:
        raise config.missing("model_type", supported)
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise config.error("model_type", model_type, supported)
    if architectures and family.architecture not in architectures:
        raise config.error("architectures", architectures, f"{model_type} must be {family.architecture}")
    return str(model_type), family


def _refuse_unsupported(config: Fields) -> None:
    if config.get("hidden_act") not in (None, "silu"):
        raise config.error("hidden_act", config.get("hidden_act"), "only silu is computed")
    if config.boolean("use_sliding_window", default=False):
        raise config.error("use_sliding_window", True, "sliding window attention is not computed; must be false")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise config.error("layer_types", kinds, "every layer must be full_attention")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise config.error(key, config.get(key), "quantized weights are not read; use the bfloat16 checkpoint")
    _refuse_partial_rotary(config)


def _refuse_partial_rotary(fields: Fields) -> None:
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise fields.error("partial_rotary_factor", fields.get("partial_rotary_factor"), "only 1 is computed")


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
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
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
    if name not in DTYPES:
        raise config.error(key, value, f"must be one of {', '.join(DTYPES)}")
    return name


def _eos(model_dir: Path, config: Fields, vocab: int) -> tuple[int, ...]:
    """Return the ids that end a generation: of `generation_config.json`, else of `config.json`, else none."""
    fields, generation = config, model_dir / "generation_config.json"
    if generation.exists() and (read := read_json(generation)).get("eos_token_id") is not None:
        fields = read
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < vocab for token in ids):
        raise fields.error("eos_token_id", value, f"must be a token id, or a list of them, from 0 to {vocab - 1}")
    return tuple(ids)


def _rope(config: Fields, family: _Family, positions: int, override: Mapping[str, object] | None) -> RopeSpec:
    stored = _stored_rope(config)
    fields = Fields("model.rope_scaling", override) if override else stored
    kind = _rope_kind(fields)
    theta_from = next((f for f in (fields, stored, config) if f.get("rope_theta") is not None), config)
    theta = theta_from.number("rope_theta", default=family.rope_theta, above=1.0)
    factor = fields.number("factor", at_least=1.0, at_most=1e6) if kind != "default" else 1.0
    if kind in ("default", "linear"):
        return RopeSpec(theta, kind, factor)
    original = _original_positions(config, fields, stored, positions)
    band = _ROPE_BANDS[kind].items()
    (low, lower), (high, upper) = ((key, fields.number(key, default=usual, above=0.0)) for key, usual in band)
    if upper <= lower:
        raise fields.error(high, upper, f"must be above {low} ({lower:g})")
    return RopeSpec(
        theta, kind, factor, original, **{low: lower, high: upper},
        attention_factor=fields.optional_number("attention_factor", above=0.0),
        mscale=fields.optional_number("mscale", at_least=0.0),
        mscale_all_dim=fields.optional_number("mscale_all_dim", at_least=0.0),
        truncate=fields.boolean("truncate", default=True),
    )  # fmt: skip


def _original_positions(config: Fields, fields: Fields, stored: Fields, positions: int) -> int:
    """Return the positions of pretraining, as in transformers: top-level key, rope settings, max_position_embeddings.

    An override that leaves out what the replaced settings knew is refused: transformers would take the stretched value.
    """
    key = "original_max_position_embeddings"
    if fields is not stored and fields.get(key) is None and stored.get(key) not in (None, positions):
        raise fields.missing(key, f"must be given, as config.json's own rope settings say {stored.get(key)}")
    own_first = (fields, config) if fields is not stored else (config, fields)
    source = next((f for f in own_first if f.get(key) is not None), fields)
    return source.integer(key, default=positions, high=MAX_POSITIONS)


def _stored_rope(config: Fields) -> Fields:
    """Return the rope settings of `config.json` under either name; empty when there are none."""
    new, old = (
        config.section(key, 'must be an object such as {"rope_type": "yarn", "factor": 4.0}')
        for key in ("rope_parameters", "rope_scaling")
    )
    if new.values and old.values and new.values != old.values:
        raise config.error("rope_scaling", old.values, "differs from rope_parameters; keep one of them")
    return new if new.values else old


def _rope_kind(fields: Fields) -> str:
    old, new = fields.get("type"), fields.get("rope_type")
    kind = next((name for name in (new, old) if name is not None), "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise fields.error("rope_type", kind, f"must be one of {', '.join(_ROPE_KEYS)}")
    if old is not None and old != kind:
        raise fields.error("type", old, f"differs from rope_type ({kind}); keep one of them")
    for key, value in fields.values.items():
        if value is not None and key not in _ROPE_KEYS[kind] and key not in _ROPE_COMMON:
            allowed = ", ".join(("rope_theta", *_ROPE_KEYS[kind]))
            raise fields.error(key, value, f"not a setting of rope_type {kind}, which takes {allowed}")
    _refuse_partial_rotary(fields)
    return kind
