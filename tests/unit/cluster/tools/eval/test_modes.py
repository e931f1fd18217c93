"""Modes of attention as settings of one YAML: positions, sparse prefill, room for KV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config.deployment import load_config
from cluster.tools.assets import configs_dir, needle_dir
from cluster.tools.eval.modes import MODES, Target, dual_chunk_overrides, find_target, load_mode, trained_window
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
