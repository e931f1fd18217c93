"""Settings of a GGUF file give the spec that the same model's `config.json` gives; what is not read is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.model.config_json import load_model_spec
from protos.model.gguf.config import config_of, read_config
from protos.model.gguf.file import GgufError, read_gguf
from protos.model.json_fields import ModelConfigError
from tests.support.data.checkpoints import FAMILIES, make_checkpoint
from tests.support.gguf_files import convert

NOT_IN_THE_FORMAT = {"qwen3_moe_raw", "qwen3_moe_dense_layer", "qwen3_moe_step2", "qwen3_yarn", "llama_bias_llama3"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_IN_THE_FORMAT))
def test_the_spec_is_that_of_config_json(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=2)
    spec = load_model_spec(convert(folder, tmp_path / "m.gguf"))
    expected = load_model_spec(folder)
    assert replace(spec, norm_topk_prob=expected.norm_topk_prob) == expected
    assert spec.norm_topk_prob


def test_ends_are_those_llama_cpp_ends_at(tmp_path: Path, llama: Path) -> None:
    settings = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "b"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1, 3], "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
    }  # fmt: skip
    spec = load_model_spec(convert(llama, tmp_path / "m.gguf", settings=settings))
    assert spec.eos_token_ids == (2, 4, 1)  # not 3: a text of that spelling


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """As convert_hf_to_gguf.py writes them for Llama 3.1."""
    values = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            values.append(1.0)
        elif wavelength > 8192 / 1.0:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


def with_factors(folder: Path, path: Path, factors: np.ndarray) -> Path:
    from unittest.mock import patch

    from tests.support import gguf_files

    tensors = gguf_files._tensors
    more = {"rope_freqs.weight": factors}
    with patch.object(gguf_files, "_tensors", lambda *given: tensors(*given) | more):
        return convert(folder, path, settings={"llama.rope.freq_base": 500_000.0})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama_3_are_its_settings(tmp_path: Path, factor: float) -> None:
    folder = make_checkpoint(tmp_path / "hf", "llama", num_hidden_layers=1, head_dim=64, num_attention_heads=2)
    rope = load_model_spec(with_factors(folder, tmp_path / "m.gguf", llama3_factors(5e5, 64, factor))).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_position_embeddings) == ("llama3", 5e5, factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)


def test_other_factors_are_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(GgufError, match=r"rope_freqs\.weight: not those of Llama 3\.1 or 3\.2"):
        read_config(with_factors(llama, tmp_path / "a.gguf", np.linspace(1, 2, 8, dtype=np.float32)))
    with pytest.raises(GgufError, match=r"rope_freqs\.weight: 7 factors: must be half the width of a head"):
        read_config(with_factors(llama, tmp_path / "b.gguf", np.ones(7, np.float32)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"general.architecture": "gemma3"},
            "general.architecture: gemma3: supported are qwen3moe, qwen3, qwen2, llama",
        ),
        ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window: 128: sliding window"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8: experts are read of qwen3moe only"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: 8: must be 16"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope: must be none, linear or yarn"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv: differs by layer"),
        ({"llama.residual_scale": 0.5}, "llama.residual_scale: 0.5: a setting that is not read"),
        ({"llama.attention.causal": False}, "llama.attention.causal: False: must be True"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, llama: Path, settings: dict[str, Any], words: str) -> None:
    path = convert(llama, tmp_path / "m.gguf", settings=settings)
    file = read_gguf(path)
    if "general.architecture" in settings:
        file = replace(file, settings=dict(file.settings) | settings)
    with pytest.raises(GgufError, match=re.escape(words)):
        config_of(file)


def test_harmless_settings_are_read_over(tmp_path: Path, llama: Path) -> None:
    settings = {"llama.vocab_size": 256, "llama.attention.sliding_window": 4096, "llama.attention.causal": True}
    assert load_model_spec(convert(llama, tmp_path / "m.gguf", settings=settings)) == load_model_spec(llama)


@pytest.mark.parametrize(
    ("key", "words"), [("llama.block_count", "num_hidden_layers"), ("llama.embedding_length", "hidden_size")]
)
def test_missing_settings_are_named(tmp_path: Path, llama: Path, key: str, words: str) -> None:
    path = convert(llama, tmp_path / "m.gguf", leave_out=(key,))
    with pytest.raises(ModelConfigError, match=rf"m\.gguf: {words}: missing"):
        load_model_spec(path)


def test_matrices_of_other_types_compute_in_bfloat16(tmp_path: Path, llama: Path) -> None:
    from gguf import GGMLQuantizationType as Kind

    assert load_model_spec(convert(llama, tmp_path / "wide.gguf")).dtype == "float32"
    assert load_model_spec(convert(llama, tmp_path / "m.gguf", lambda name: Kind.Q8_0)).dtype == "bfloat16"
    assert json.loads((llama / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
