"""Modes of attention as settings of one YAML: positions, sparse prefill, room for KV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config.configs_dir import configs_dir
from cluster.config.deployment import load_config
from cluster.tools.assets import needle_dir
from cluster.tools.eval.modes import (
    MODES,
    Target,
    dual_chunk_overrides,
    find_target,
    load_mode,
    set_aside,
    trained_window,
)
from protos.errors import UserError
from tests.support.data.checkpoints import make_checkpoint

DEMO = Target(configs_dir() / "demo.yaml")


def test_modes_are_settings_of_one_checkpoint() -> None:
    plain, yarn, dca, sparse = (load_mode(DEMO, mode, 16384, extra_tokens=4096) for mode in MODES)
    assert (plain.spec.rope.kind, plain.spec.dual_chunk, plain.spec.sparse) == ("default", None, None)
    assert (yarn.spec.rope.kind, yarn.spec.rope.factor, yarn.spec.sparse) == ("yarn", 4.0, None)
    assert yarn.spec.rope.original_max_position_embeddings == trained_window(needle_dir()) == 4096
    assert dca.spec.rope.kind == "default"
    assert dca.spec.dual_chunk is not None
    assert dca.spec.sparse is None
    assert sparse.spec.dual_chunk == dca.spec.dual_chunk
    assert sparse.spec.sparse is not None
    assert sparse.spec.sparse.threshold == 0
    assert sparse.config.prefill.max_num_batched_tokens >= 3584  # a whole cell
    for deployment in (plain, yarn, dca, sparse):
        assert deployment.max_model_len == 16384
        assert deployment.config.kv_cache.bytes is not None
    more = {"sparse.cell": "2K"}
    published = load_mode(DEMO, "sparse", 16384, sparse_threshold=None, kv="int8", more=more)
    assert published.spec.sparse is not None
    assert (published.spec.sparse.threshold, published.spec.sparse.cell) == (8192, 2048)
    assert published.config.kv_cache.dtype == "int8"


def test_kv_grows_with_the_longest_length() -> None:
    loaded = [load_mode(DEMO, "yarn", length, extra_tokens=1000) for length in (4096, 1 << 20)]
    small, large = (deployment.config.kv_cache.bytes for deployment in loaded)
    assert small == load_config(DEMO.config).kv_cache.bytes  # of the YAML, when that is enough
    assert large == ((1 << 20) + 1000 + 128) * 512  # what an actor keeps a token


def test_targets(tmp_path: Path) -> None:
    assert find_target(None, None).config.name == "demo.yaml"
    model = make_checkpoint(tmp_path / "tiny", "qwen3")
    assert find_target(None, model).config.name == "single.yaml"
    assert find_target(tmp_path / "x.yaml", model) == Target(tmp_path / "x.yaml", model)
    with pytest.raises(UserError, match="--model"):
        find_target(None, tmp_path)


def test_dual_chunk_attention_comes_from_the_yaml_or_a_published_file(tmp_path: Path) -> None:
    assert dual_chunk_overrides(DEMO) == {
        "model.rope_scaling": None, "model.dual_chunk_attention": None, "model.config_file": "config_1m.json",
    }  # fmt: skip
    model = make_checkpoint(tmp_path / "tiny", "qwen3")
    assert dual_chunk_overrides(Target(DEMO.config, model)) is None
    with pytest.raises(UserError, match=r"--modes: dca: .* has neither config_1m.json nor dual_chunk_attention_config"):
        load_mode(Target(DEMO.config, model), "dca", 64)
    given = tmp_path / "given.yaml"
    given.write_text(f"model: {{path: {model}, dual_chunk_attention: {{chunk_size: 64, local_size: 32}}}}\n")
    assert dual_chunk_overrides(Target(given)) == {}


DUAL = "{chunk_size: 64, local_size: 32}"


def test_a_checkpoint_replaces_the_path_of_the_yaml_alone(tmp_path: Path) -> None:
    model, other = (make_checkpoint(tmp_path / name, "qwen3") for name in ("tiny", "other"))
    yaml = tmp_path / "given.yaml"
    yaml.write_text(
        f"model: {{path: {other}, served_model_name: other, dual_chunk_attention: {DUAL}, dtype: float32,\n"
        "  document_prompt: '{document} {question}'}\n"
        "sparse: {cell: 128}\nprefill: {max_num_seqs: 3}\n"
    )
    for mode in MODES:
        found = load_mode(Target(yaml, model), mode, 64)
        config = found.config
        assert (config.model.path, config.model.served_model_name) == (model, "tiny")
        assert (config.model.dtype, config.model.document_prompt) == ("float32", "{document} {question}")
        assert (config.prefill.max_num_seqs, config.sparse.cell) == (3, 128)
        assert config.model.sampling_defaults == "greedy"
        dual = found.spec.dual_chunk
        assert (None if dual is None else (dual.chunk_size, dual.local_size)) == (
            (64, 32) if mode in ("dca", "sparse") else None
        )
        said = set_aside(Target(yaml, model), mode, found)
        assert [f"{mode}: sets model.dual_chunk_attention of {yaml} aside" in line for line in said] == (
            [True] if dual is None else []
        )


@pytest.mark.parametrize("config", ["demo.yaml", "single.yaml"])
def test_dual_chunk_attention_may_be_set_on_the_command_line(tmp_path: Path, config: str) -> None:
    """demo.yaml names a config_file that the checkpoint does not have."""
    model = make_checkpoint(tmp_path / "tiny", "qwen3")
    more = {"model.dual_chunk_attention": {"chunk_size": 64, "local_size": 32}, "kv_cache.page_size": 32}
    found = load_mode(Target(configs_dir() / config, model), "dca", 64, more=more)
    assert found.spec.dual_chunk is not None
    assert found.spec.dual_chunk.chunk_size == 64
    assert load_mode(Target(configs_dir() / config, model), "plain", 64).spec.dual_chunk is None


def test_a_published_file_of_the_checkpoint_is_used(tmp_path: Path) -> None:
    yaml = tmp_path / "given.yaml"
    yaml.write_text(f"model: {{path: {tmp_path}, rope_scaling: {{rope_type: yarn, factor: 2.0}}}}\n")
    found = load_mode(Target(yaml, needle_dir()), "sparse", 64)
    assert (found.spec.dual_chunk is not None, found.spec.rope.kind) == (True, "default")
    assert set_aside(Target(yaml, needle_dir()), "sparse", found) == [
        f"sparse: sets model.rope_scaling of {yaml} aside; its positions are the mode's own"
    ]


def test_the_window_a_model_was_trained_on(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", "qwen3")
    config = json.loads((model / "config.json").read_text())
    positions = config["max_position_embeddings"]
    assert trained_window(model) == positions
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    (model / "config.json").write_text(
        json.dumps(config | {"rope_parameters": yarn | {"rope_theta": 10000.0}, "rope_scaling": None})
    )
    assert trained_window(model) == 16
