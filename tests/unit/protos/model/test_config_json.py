"""`config.json` -> `ModelSpec`: equal to transformers where it is accepted, one clear error where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.model.config_json import load_model_spec
from protos.model.json_fields import ModelConfigError
from protos.model.spec import DualChunkSpec, HeadBudget, RopeSpec
from tests.support.planner.models import QWEN25_7B_1M

# Qwen3-30B-A3B-Instruct-2507 as published, in the spelling before transformers 5
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
DROP = object()


def write(folder: Path, changes: dict[str, Any] | None = None, generation: Any = None) -> Path:
    config = {key: value for key, value in (QWEN3_30B | (changes or {})).items() if value is not DROP}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_published_qwen3_30b(tmp_path: Path) -> None:
    spec = load_model_spec(write(tmp_path, generation={"eos_token_id": [151645, 151643]}))
    assert (spec.model_type, spec.vocab_size, spec.hidden_size, spec.num_hidden_layers) == (
        "qwen3_moe", 151936, 2048, 48,
    )  # fmt: skip
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (32, 4, 128)
    assert (spec.num_experts, spec.moe_intermediate_size, spec.num_experts_per_tok) == (128, 768, 8)
    assert spec.rope == RopeSpec(theta=1e7)
    assert (spec.max_context, spec.dtype, spec.eos_token_ids) == (262144, "bfloat16", (151645, 151643))
    assert spec.norm_topk_prob
    assert spec.qk_norm
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.tie_word_embeddings) == (False,) * 4
    assert all(spec.is_moe_layer(layer) for layer in range(48))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 7}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Qwen3MoeConfig", {}),
        ("Qwen3MoeConfig", SMALL | {"num_experts": 16, "num_experts_per_tok": 2, "mlp_only_layers": [1],
                                    "decoder_sparse_step": 2, "head_dim": 32, "dtype": "bfloat16"}),
        ("Qwen3MoeConfig", {"attention_bias": True, "rope_parameters": {"rope_theta": 5e6, **YARN}}),
        ("Qwen3Config", {}),
        ("Qwen3Config", SMALL | {"tie_word_embeddings": True, "rope_scaling": {"type": "yarn", "factor": 2.5}}),
        ("Qwen3Config", {"attention_bias": True, "rope_parameters": {
            "rope_type": "yarn", "factor": 40, "rope_theta": 1e6, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7,
            "mscale_all_dim": 1.0, "truncate": False, "attention_factor": 1.25}}),
        ("Qwen2Config", {"dtype": "float16", "eos_token_id": [1, 2]}),
        ("Qwen2Config", SMALL | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
        ("LlamaConfig", {}),
        ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "rope_theta": 5e5}),
        ("LlamaConfig", {"max_position_embeddings": 131072, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    ],
)  # fmt: skip
def test_equals_transformers(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = getattr(transformers, name)(**arguments)
    config.save_pretrained(tmp_path)
    spec = load_model_spec(tmp_path)
    direct = (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    assert {key: getattr(spec, key) for key in direct} == {key: getattr(config, key) for key in direct}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert spec.head_dim == head_dim
    if name == "Qwen3MoeConfig":
        keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
        assert {key: getattr(spec, key) for key in keys} == {key: getattr(config, key) for key in keys}
        assert list(spec.mlp_only_layers) == config.mlp_only_layers
    else:
        assert spec.num_experts == 0
    bias = True if name == "Qwen2Config" else config.attention_bias
    assert (spec.qkv_bias, spec.o_bias) == (bias, bias and name != "Qwen2Config")
    assert spec.mlp_bias == getattr(config, "mlp_bias", False)
    assert spec.qk_norm == name.startswith("Qwen3")
    rope = config.rope_parameters
    assert (spec.rope.kind, spec.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    for key, value in rope.items():
        if key not in ("rope_type", "type", "rope_theta"):
            assert getattr(spec.rope, key) == value, key
    eos = config.eos_token_id
    assert spec.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert spec.dtype == (str(config.dtype).removeprefix("torch.") if config.dtype else "float32")


def test_top_level_original_positions_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    write(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 4096})
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()
    ours = load_model_spec(tmp_path).rope
    assert ours.original_max_position_embeddings == 4096
    assert theirs.rope_parameters["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("rope", "positions", "context"),
    [
        (None, 262144, 262144),
        (YARN, 262144, 1048576),
        (YARN | {"original_max_position_embeddings": 32768}, 262144, 262144),
        (YARN | {"original_max_position_embeddings": 32769, "factor": 8.001}, 131072, 262184),
        ({"type": "yarn", "factor": 4}, 32768, 131072),
        ({"type": "linear", "factor": 2.5}, 4097, 10242),
        (LLAMA3, 131072, 131072),
    ],
)
def test_max_context(tmp_path: Path, rope: dict[str, Any] | None, positions: int, context: int) -> None:
    changes = {"rope_scaling": rope, "max_position_embeddings": positions}
    assert load_model_spec(write(tmp_path, changes)).max_context == context


def test_override_replaces_the_kind_and_keeps_theta(tmp_path: Path) -> None:
    write(tmp_path, {"rope_scaling": {"type": "linear", "factor": 2.0}})
    spec = load_model_spec(tmp_path, {"rope_type": "yarn", "factor": 4.0})
    assert spec.rope == RopeSpec(1e7, "yarn", 4.0, 262144)
    assert load_model_spec(tmp_path, {"rope_type": "default", "rope_theta": 5e5}).rope == RopeSpec(5e5)
    assert load_model_spec(tmp_path, {}).rope.kind == "linear"
    with pytest.raises(ModelConfigError, match=r"^model\.rope_scaling: factor: missing: must be a number at least 1"):
        load_model_spec(tmp_path, {"rope_type": "yarn"})


def test_override_must_repeat_known_original_positions(tmp_path: Path) -> None:
    write(tmp_path, {"rope_scaling": YARN | {"original_max_position_embeddings": 32768}})
    with pytest.raises(ModelConfigError, match=r"original_max_position_embeddings: missing.*32768"):
        load_model_spec(tmp_path, {"rope_type": "yarn", "factor": 8.0})


def test_theta_of_transformers_5_spelling_survives_an_override(tmp_path: Path) -> None:
    write(tmp_path, {"rope_theta": DROP, "rope_scaling": DROP, "rope_parameters": {"rope_theta": 3e6}})
    assert load_model_spec(tmp_path, YARN).rope.theta == 3e6


def test_eos_falls_back_to_config(tmp_path: Path) -> None:
    assert load_model_spec(write(tmp_path, generation={"temperature": 0.7})).eos_token_ids == (151645,)
    assert load_model_spec(write(tmp_path, {"eos_token_id": None})).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, "model_type: 'deepseek_v3': supported are qwen3_moe, qwen3, qwen2, llama"),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            "model_type: 'mixtral': supported are qwen3_",
        ),
        (
            {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]},
            "model_type: 'glm4_moe': supported are qw",
        ),
        (
            {"model_type": "qwen3_next"},
            "supported are qwen3_moe, qwen3, qwen2, llama, and the text of qwen3_vl, qwen3_",
        ),
        ({"model_type": "qwen3_vl_moe"}, "architectures: ['Qwen3MoeForCausalLM']: qwen3_vl_moe must be Qwen3VLMoeFor"),
        ({"model_type": "qwen3_vl", "architectures": None}, "text_config: missing: must be an object: the settings of"),
        ({"model_type": "qwen3_vl", "architectures": None, "text_config": [1]}, "text_config: [1]: must be an object"),
        ({"model_type": DROP, "architectures": DROP}, "model_type: missing: supported are"),
        ({"model_type": DROP, "architectures": ["GPT2LMHeadModel"]}, "architectures: ['GPT2LMHeadModel']: supported"),
        ({"model_type": ["llama"]}, "model_type: ['llama']: supported are"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "qwen3_moe must be Qwen3MoeForCausalLM"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "must be a list of class names"),
        ({"vocab_size": DROP}, "vocab_size: missing: must be a whole number from 1"),
        ({"vocab_size": 1 << 40}, "vocab_size: 1099511627776: must be a whole number"),
        ({"hidden_size": "2048"}, "hidden_size: '2048': must be a whole number"),
        ({"hidden_size": 2048.5}, "hidden_size: 2048.5: must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0: must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True: must be"),
        ({"num_attention_heads": -32}, "num_attention_heads: -32: must be"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5: must divide num_attention_heads (32)"),
        ({"num_attention_heads": 36, "head_dim": None}, "num_attention_heads: 36: must divide hidden_size (2048)"),
        ({"head_dim": 127}, "head_dim: 127: must be even"),
        ({"intermediate_size": None}, "intermediate_size: missing"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0: must be a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: '1e-6': must be a number"),
        ({"rms_norm_eps": float("nan")}, "not valid JSON (NaN is not a JSON number)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false': must be true or false"),
        ({"attention_bias": 1}, "attention_bias: 1: must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu': only silu"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window: True: sliding window attention is"),
        ({"use_sliding_window": True, "sliding_window": DROP}, "use_sliding_window: True: sliding window attention is"),
        ({"text_config": {"hidden_size": 8}}, "text_config: {'hidden_size': 8}: settings of a part of the model"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config: {'1': {'head_dim': 8}}: settings of a part"),
        ({"architectures": ["Qwen3Model"]}, "architectures: ['Qwen3Model']: qwen3_moe must be Qwen3MoeForCausalLM"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config: quant_method: 'mxfp4': supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5: only 1"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn': must be one of bfloat16, float16, float32"),
        ({"eos_token_id": 151936}, "eos_token_id: 151936: must be a token id"),
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>': must be a token id"),
        ({"eos_token_id": [1, True]}, "eos_token_id: [1, True]"),
        ({"num_experts": DROP}, "num_experts: missing"),
        ({"num_experts": 4}, "num_experts_per_tok: 8: must be a whole number from 1 to 4"),
        ({"num_local_experts": 64}, "num_local_experts: 64: must equal num_experts (128)"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers: [48]: must be a list of layers from 0 to 47"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3"),
        ({"mlp_only_layers": [0] * 49}, "mlp_only_layers: [0, 0,"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000: must be a whole number from 1 to 1000"),
        ({"num_attention_heads": 1 << 24}, "num_attention_heads: 16777216: must be a whole number from 1 to 4096"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0"),
        ({"rope_theta": -1e4}, "rope_theta: -10000.0"),
        ({"rope_scaling": [4.0]}, "rope_scaling: [4.0]: must be an object"),
        ({"rope_scaling": {"factor": 4.0}}, "factor: 4.0: not a setting of rope_type default"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic': must be one of default, linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type: 'longrope': must be one of"),
        ({"rope_scaling": {"factor": True}}, "factor: True: not a setting of rope_type default"),
        (
            {"rope_scaling": {"rope_type": "default", "attention_factor": 1.2}},
            "attention_factor: 1.2: not a setting of",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 1, "long_factor": [1]}},
            "long_factor: [1]: not a setting",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope_scaling: factor: missing"),
        (
            {"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 524288}},
            "factor: None: must be",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor: missing"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor: 0.5: must be a number at least 1"),
        ({"rope_scaling": YARN | {"factor": True}}, "factor: True"),
        ({"rope_scaling": YARN | {"extrapolation_factor": 1}}, "extrapolation_factor: 1: not a setting of"),
        ({"rope_scaling": YARN | {"a\nb": "c\u2028"}}, r"'a\nb': 'c\u2028': not a setting of"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings: 0"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1}}, "beta_fast: 1.0: must be above beta_slow (1)"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate: 1: must be true or false"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor: 0.25"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "differs from rope_parameters"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor: missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor: 1.0: must be above low_freq_factor"),
    ],
)
def test_refused_with_one_clear_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        load_model_spec(write(tmp_path, changes))
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "config.json"))
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1e999}', b"{}"])
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelConfigError, match=r"config\.json: "):
        load_model_spec(tmp_path)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match="cannot be read"):
        load_model_spec(tmp_path / "absent")
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"generation_config\.json: not valid JSON"):
        load_model_spec(tmp_path)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*sorted(QWEN3_30B), "rope_parameters"]), ANY_JSON, max_size=3))
def test_any_value_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    folder = write(tmp_path_factory.getbasetemp(), changes)
    try:
        load_model_spec(folder)
    except ModelConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_the_text_of_a_model_of_images(tmp_path: Path) -> None:
    """Qwen3-VL-30B-A3B: the language model is that of Qwen3-30B-A3B, whatever its section leaves out."""
    mrope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {key: value for key, value in QWEN3_30B.items() if key not in ("architectures", "norm_topk_prob")}
    text |= {"model_type": "qwen3_vl_moe_text", "rope_scaling": mrope, "tie_word_embeddings": True}
    whole = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "text_config": text,
        "vision_config": {"depth": 27}, "image_token_id": 151655, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = load_model_spec(tmp_path)
    assert found == load_model_spec(write(tmp_path))
    text.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(whole | {"tie_word_embeddings": True}))
    found = load_model_spec(tmp_path)
    assert (found.rope, found.tie_word_embeddings) == (RopeSpec(theta=5e5), True)
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text | {"hidden_size": "x"}}))
    with pytest.raises(ModelConfigError, match=r"config.json: text_config: hidden_size: 'x': must be a whole number"):
        load_model_spec(tmp_path)


def test_published_qwen25_1m(tmp_path: Path) -> None:
    """Qwen2.5-7B-Instruct-1M: dual chunk attention by config.json, patterns of heads by the file beside it."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B_1M))
    spec = load_model_spec(tmp_path)
    assert spec.dual_chunk == DualChunkSpec(262144, 8192, 262144)
    assert (spec.model_type, spec.head_dim, spec.rope, spec.qkv_bias) == ("qwen2", 128, RopeSpec(theta=1e7), True)
    assert (spec.default_context, spec.sparse) == (1_010_000, None)
    heads = {str(head): ["vertical_and_slash", 1000, 6096, 0.9] for head in range(28)}
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps([heads] * 28))
    sparse = load_model_spec(tmp_path).sparse
    assert sparse is not None
    assert sparse.patterns == ((HeadBudget(1000, 6096),) * 28,) * 28
    assert sparse.threshold == 32768
