"""Dual chunk attention and sparse prefill in `config.json` and in the YAML: what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protos.model.config_json import load_model_spec
from protos.model.json_fields import ModelConfigError
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec

LAYERS, HEADS = 3, 4
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 1000, "max_position_embeddings": 1010000, "rms_norm_eps": 1e-6, "rope_theta": 1e7,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 7,
}  # fmt: skip
DUAL = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
HEAD = ["vertical_and_slash", 1000, 6096, 336379.5]
PATTERNS = [
    {"0": HEAD, "1": HEAD, "2": ["vertical_and_slash", 30, 800, 1.0], "3": ["vertical_and_slash", 500, 700]},
    {},
    {"3": ["vertical_and_slash", 3500, 100, None]},
]
SPARSE = DUAL | {"sparse_attention_enabled": True, "sparse_attention_config": PATTERNS}


def load(folder: Path, dual: Any = None, name: str = "config.json", **given: Any) -> Any:
    config = MODEL | ({} if dual is None else {"dual_chunk_attention_config": dual})
    (folder / name).write_text(json.dumps(config))
    return load_model_spec(folder, **given)


def test_published_constants(tmp_path: Path) -> None:
    spec = load(tmp_path, DUAL)
    assert spec.dual_chunk == DualChunkSpec(262144, 8192, 262144)
    assert spec.chunk_distance == 253952
    assert spec.sparse is None
    assert (spec.max_context, spec.default_context) == (1 << 30, 1010000)
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_published_patterns(tmp_path: Path) -> None:
    spec = load(tmp_path, SPARSE)
    wide = HeadBudget(1000, 6096)
    assert spec.sparse == SparseSpec(
        patterns=(
            (wide, wide, HeadBudget(130, 800), HeadBudget(500, 700)),
            (None,) * HEADS,
            (None, None, None, HeadBudget(3500, 100)),
        )
    )
    assert (spec.sparse.threshold, spec.sparse.last_q, spec.sparse.recall_floor) == (32768, 64, 0.0)
    assert ModelSpec.from_json(spec.to_json()) == spec


INLINE = DUAL | {"sparse_attention_config": PATTERNS}
FIRST, OTHER = HeadBudget(1000, 6096), HeadBudget(7, 9)
IN_FILE = [{head: ["vertical_and_slash", 7, 9, 0.5] for head in "0123"}] * LAYERS


@pytest.mark.parametrize(("stored", "file", "given", "first"), [
    (INLINE, None, None, FIRST),  # the published code's default
    (INLINE | {"sparse_attention_enabled": False}, None, None, None),
    (INLINE | {"sparse_attention_enabled": None}, None, None, None),
    (INLINE | {"sparse_attention_enabled": False}, None, {"enabled": True}, FIRST),
    (INLINE, None, {"enabled": False}, None),
    (DUAL, IN_FILE, None, OTHER),
    (INLINE, IN_FILE, None, OTHER),  # the file goes before
    (INLINE, [], None, FIRST),  # unless it is empty
    (DUAL, {}, None, None),
    (DUAL, None, None, None),
    (DUAL | {"sparse_attention_enabled": False}, IN_FILE, None, None),
    (DUAL | {"sparse_attention_enabled": False}, "[", None, None),  # nothing depends on it
    (DUAL | {"sparse_attention_enabled": True}, IN_FILE, None, OTHER),
    (DUAL, IN_FILE, {"enabled": False}, None),
    (DUAL, "[", {"enabled": False}, None),
    (None, IN_FILE, None, None),  # without a recipe in config.json the published code reads no patterns
    (None, IN_FILE, {"enabled": True}, OTHER),
])  # fmt: skip
def test_published_patterns_switch_sparse_prefill_on(
    tmp_path: Path, stored: Any, file: Any, given: Any, first: HeadBudget | None
) -> None:
    if file is not None:
        text = file if isinstance(file, str) else json.dumps(file)
        (tmp_path / "sparse_attention_config.json").write_text(text)
    sparse = load(tmp_path, stored, sparse=given).sparse
    assert (sparse and sparse.patterns[0][0]) == first
    assert sparse is None or sparse.recall_floor == 0.0


def test_the_yaml_sets_the_patterns_of_the_file_aside(tmp_path: Path) -> None:
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(IN_FILE))
    assert load(tmp_path, DUAL, sparse={"n_vertical": 5, "n_slash": 6}).sparse.uniform == HeadBudget(5, 6)
    assert load(tmp_path, DUAL, sparse={"target_recall": 0.9}).sparse.is_adaptive
    assert load(tmp_path, DUAL, sparse={"threshold": 11}).sparse.patterns[2][3] == OTHER


@pytest.mark.parametrize(("file", "message"), [
    ("[", "not valid JSON"),
    ("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the file itself: run git lfs pull"),
    ("1", "patterns: 1: must be a list of 3 objects, one a layer; is no list"),
    (json.dumps({"0": IN_FILE[0]}), "must be a list of 3 objects, one a layer; is no list"),
    (json.dumps(IN_FILE[:2]), "must be a list of 3 objects, one a layer; has 2; move the file away, or say"),
    (json.dumps([*IN_FILE[:2], {"4": HEAD}]), "patterns[2]: '4': must be a head from 0 to 3"),
    (json.dumps([*IN_FILE[:2], {"0": ["block_sparse", 1, 1, 1]}]), "patterns[2][0]: ['block_sparse', 1, 1, 1]: must"),
    (json.dumps([*IN_FILE[:2], {"0": ["vertical_and_slash", 1]}]), "patterns[2][0]"),
])  # fmt: skip
def test_a_bad_file_of_patterns_is_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "sparse_attention_config.json").write_text(file)
    with pytest.raises(ModelConfigError) as caught:
        load(tmp_path, DUAL)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'sparse_attention_config.json'}: ")
    assert message in text
    assert text.isprintable()


def test_another_file_of_the_folder(tmp_path: Path) -> None:
    load(tmp_path, DUAL, "config_1m.json", config_file="config_1m.json")
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": 262144}))
    assert load_model_spec(tmp_path).dual_chunk is None
    assert load_model_spec(tmp_path).default_context == 262144
    assert load_model_spec(tmp_path, config_file="config_1m.json").dual_chunk == DualChunkSpec(262144, 8192, 262144)
    with pytest.raises(ModelConfigError, match=r"config_2m\.json: cannot be read"):
        load_model_spec(tmp_path, config_file="config_2m.json")


@pytest.mark.parametrize(("stored", "given", "wanted"), [
    (None, None, None),
    (None, {}, None),
    ({}, None, None),
    (DUAL, {}, DualChunkSpec(262144, 8192, 262144)),
    (DUAL, {"enabled": False}, None),
    (DUAL, {"enabled": False, "chunk_size": 64}, None),
    (DUAL, {"local_size": 4096, "chunk_size": None}, DualChunkSpec(262144, 4096, 262144)),
    (DUAL, {"original_max_position_embeddings": 0}, DualChunkSpec(262144, 8192, 0)),
    (None, {"chunk_size": 96, "local_size": 32}, DualChunkSpec(96, 32, 0)),
    (None, {"enabled": True, "chunk_size": 2, "local_size": 1}, DualChunkSpec(2, 1, 0)),
    ({"chunk_size": 96, "local_size": 95}, None, DualChunkSpec(96, 95, 0)),
    ({"sparse_attention_enabled": True}, None, None),
])  # fmt: skip
def test_the_yaml_goes_before_the_file(tmp_path: Path, stored: Any, given: Any, wanted: DualChunkSpec | None) -> None:
    assert load(tmp_path, stored, dual_chunk=given).dual_chunk == wanted


@pytest.mark.parametrize(("positions", "chunk", "wanted"), [(1010000, 262144, 1010000), (96, 96, 384), (97, 96, 97)])
def test_default_context(tmp_path: Path, positions: int, chunk: int, wanted: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": positions}))
    spec = load_model_spec(tmp_path, dual_chunk={"chunk_size": chunk, "local_size": 32})
    assert (spec.max_context, spec.default_context) == (1 << 30, wanted)


ADAPTIVE = SparseSpec(recall_floor=0.9)
UNIFORM = {"n_vertical": 1000, "n_slash": 6096}


@pytest.mark.parametrize(("stored", "given", "wanted"), [
    (SPARSE, {"enabled": False}, None),
    (None, None, None),
    (None, {"threshold": 5}, None),
    (None, {"enabled": True}, ADAPTIVE),  # plain rotary positions
    (DUAL, {"enabled": True, "threshold": 0, "last_q": 32, "cell": 64}, SparseSpec(0, 32, 64, recall_floor=0.9)),
    (DUAL, {"enabled": True, "recall_floor": 0}, SparseSpec()),
    (DUAL, {"enabled": True, **UNIFORM}, SparseSpec(uniform=HeadBudget(1000, 6096))),
    (DUAL, {"enabled": True, "n_vertical": 30, "n_slash": 100}, SparseSpec(uniform=HeadBudget(30, 100))),
    (SPARSE, UNIFORM, SparseSpec(uniform=HeadBudget(1000, 6096))),
    (SPARSE, {"target_recall": 0.9, "max_dense_share": 0.5}, SparseSpec(
        target_recall=0.9, recall_floor=0.9, max_dense_share=0.5)),
    (DUAL, {"enabled": True, "synthetic": True}, SparseSpec(synthetic=True)),
    (DUAL | {"sparse_attention_enabled": True, "sparse_attention_threshold": 99, "sparse_attention_last_q": 7}, {},
     SparseSpec(99, 7, recall_floor=0.9)),
])  # fmt: skip
def test_sparse_settings(tmp_path: Path, stored: Any, given: Any, wanted: SparseSpec | None) -> None:
    assert load(tmp_path, stored, sparse=given).sparse == wanted


def changed(value: Any, layer: int = 0, head: str = "0") -> dict[str, Any]:
    patterns = [dict(entries) for entries in PATTERNS]
    patterns[layer][head] = value
    return SPARSE | {"sparse_attention_config": patterns}


@pytest.mark.parametrize(("stored", "message"), [
    ([1], "dual_chunk_attention_config: [1]: must be an object with chunk_size"),
    ({"chunk_size": 8192}, "local_size: missing: must be a whole number from 1 to 8191"),
    ({"local_size": 8192}, "chunk_size: missing"),
    (DUAL | {"chunk_size": 1}, "chunk_size: 1: must be a whole number from 2 to"),
    (DUAL | {"chunk_size": 262144.5}, "chunk_size: 262144.5: must be a whole number"),
    (DUAL | {"chunk_size": 1010001}, "chunk_size: 1010001: must be at most 1010000, which the positions cover"),
    (DUAL | {"local_size": 262144}, "local_size: 262144: must be a whole number from 1 to 262143"),
    (DUAL | {"local_size": 0}, "local_size: 0: must be a whole number from 1 to 262143"),
    (DUAL | {"local_size": True}, "local_size: True"),
    (DUAL | {"original_max_position_embeddings": -1}, "original_max_position_embeddings: -1: must be a whole number"),
    (DUAL | {"mscale": 2}, "mscale: 2: not a setting that is computed; known are chunk_size, local_size, original_max"),
    (DUAL | {"sparse_attention_enabled": 1}, "sparse_attention_enabled: 1: must be true or false"),
    (DUAL | {"sparse_attention_threshold": -1}, "sparse_attention_threshold: -1: must be a whole number from 0"),
    (DUAL | {"sparse_attention_last_q": 0}, "sparse_attention_last_q: 0: must be a whole number from 1"),
    (SPARSE | {"sparse_attention_config": {}}, "must be a list of 3 objects, one a layer; is no list"),
    (SPARSE | {"sparse_attention_config": PATTERNS[:2]}, "must be a list of 3 objects, one a layer; has 2"),
    (SPARSE | {"sparse_attention_config": [[], {}, {}]}, "sparse_attention_config[0]: []: must be an object of heads"),
    (changed(HEAD, 1, "4"), "sparse_attention_config[1]: '4': must be a head from 0 to 3"),
    (changed(HEAD, 1, "01"), "sparse_attention_config[1]: '01': must be a head from 0 to 3"),
    (changed("dense"), "sparse_attention_config[0][0]: 'dense': must be [\"vertical_and_slash\", columns, offsets"),
    (changed(["block_sparse", 100, 100, 1.0]), "sparse_attention_config[0][0]: ['block_sparse', 100, 100, 1.0]: must"),
    (changed(["vertical_and_slash", 100]), "sparse_attention_config[0][0]"),
    (changed(["vertical_and_slash", 100, 0, 1.0]), "whole numbers from 1 to 16777216"),
    (changed(["vertical_and_slash", 1e3, 100, 1.0]), "sparse_attention_config[0][0]"),
    (changed(["vertical_and_slash", True, 100, 1.0]), "sparse_attention_config[0][0]"),
    (changed(["vertical_and_slash", 100, 100, 1.0, 2.0]), "sparse_attention_config[0][0]"),
])  # fmt: skip
def test_refused_in_the_file(tmp_path: Path, stored: Any, message: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        load(tmp_path, stored)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in text
    assert "\n" not in text
    assert len(text.removeprefix(str(tmp_path))) < 320


@pytest.mark.parametrize(("given", "message"), [
    ({"chunk_size": 96, "local_size": 96}, "model.dual_chunk: local_size: 96: must be a whole number from 1 to 95"),
    ({"chunk_size": 1010001, "local_size": 96}, "model.dual_chunk: chunk_size: 1010001: must be at most 1010000"),
    ({"chunk_size": 96}, "dual_chunk_attention_config: local_size: missing: must be a whole number from 1 to 95"),
])  # fmt: skip
def test_what_the_yaml_says_must_fit(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        load(tmp_path, None, dual_chunk=given)
    assert message in str(caught.value)
