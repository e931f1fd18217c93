"""A YAML, a folder and a config.json are read; anything else is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.config.yaml_source import ConfigError
from cluster.latency.hardware import load_hardware
from cluster.planner.plan import make_plan
from cluster.planner.subject import as_dense, as_sparse, load_subject
from cluster.planner.target import have_target
from protos.errors import UserError
from protos.model.json_fields import ModelConfigError
from tests.support.data.checkpoints import make_checkpoint
from tests.support.gguf_files import convert
from tests.support.hub.cached import cache_entry
from tests.support.paths import CONFIGS, NEEDLE
from tests.support.planner.models import QWEN3_235B_A22B, QWEN3_CODER_30B_A3B, QWEN25_7B_1M, config_json


def test_a_config_json_alone_is_enough(tmp_path: Path):
    path = config_json(tmp_path)
    for named in (path, tmp_path):
        given = load_subject(named)
        assert given.spec.num_experts == 128
        assert given.max_model_len == 262_144
        assert (len(given.shards), given.config.cluster.device) == (1, "cpu")


def test_a_yaml_keeps_its_layout_and_takes_what_is_asked():
    given = load_subject(CONFIGS / "demo.yaml", kv="int8", chunk=4096)
    assert len(given.shards) == 4
    assert given.config.kv_cache.dtype == "int8"
    assert given.config.prefill.max_num_batched_tokens == 4096


def test_another_file_of_the_model():
    assert load_subject(NEEDLE / "config_1m.json").spec.dual_chunk is not None
    assert load_subject(NEEDLE, "cuda", chunk=64).config.prefill.max_num_batched_tokens == 64


def test_dense_and_sparse_twins(tmp_path: Path):
    given = load_subject(config_json(tmp_path))
    sparse = as_sparse(given)
    assert sparse.spec.sparse is not None
    assert sparse.spec.sparse.cell == 8192
    assert sparse.config.prefill.max_num_batched_tokens == 8192
    assert as_sparse(sparse) is sparse
    assert as_dense(sparse).spec == given.spec


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent", UserError, "CONFIG: .*absent: there is no such file: name a cluster YAML"),
        ("notes.txt", UserError, "must be a cluster YAML, a config.json, a model folder or GGUF file, or"),
        ("empty.yaml", ConfigError, "empty file"),
        ("broken.json", ModelConfigError, "broken.json"),
        ("folder", ModelConfigError, "the folder is empty"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, error: type[UserError], message: str):
    (tmp_path / "folder").mkdir()
    for file in ("notes.txt", "empty.yaml", "broken.json"):
        (tmp_path / file).write_text("{" if file == "broken.json" else "")
    with pytest.raises(error, match=message):
        load_subject(tmp_path / name)


def test_a_model_named_as_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^CONFIG: org/moe: is not in the cache .*, and HF_HUB_OFFLINE forbids"):
        load_subject(Path("org/moe"))
    snapshot = cache_entry(tmp_path / "cache", "org/moe", {"config.json": config_json(tmp_path).read_bytes()})
    given = load_subject(Path("org/moe"))
    assert (given.config.model.path, given.config.model.served_model_name) == (snapshot, "moe")


def test_a_gguf_file_is_planned_as_the_checkpoint_it_was_made_from(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "tiny", "qwen3_moe")
    file = convert(folder, tmp_path / "tiny-F32.gguf")
    given, original = load_subject(file, "cuda", chunk=64), load_subject(folder, "cuda", chunk=64)
    assert (given.config.model.path, given.config.model.served_model_name) == (file, "tiny-F32")
    assert replace(given.spec, eos_token_ids=()) == replace(original.spec, eos_token_ids=())
    assert (given.shards, given.max_model_len) == (original.shards, original.max_model_len)
    context, target = given.max_model_len, have_target(load_hardware(None), "1x8GB")
    plans = [make_plan(deployment, context, target) for deployment in (given, original)]
    assert plans[0]["fits"]
    assert plans[0] == plans[1]
    yaml = tmp_path / "cluster.yaml"
    yaml.write_text(f"model: {{path: {file.name}}}\n")
    assert load_subject(yaml).spec == given.spec
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"tiny-F32\.gguf: version 0"):
        load_subject(file)


@pytest.mark.parametrize(
    ("name", "published", "parameters", "active", "context"),
    [
        ("Qwen/Qwen3-235B-A22B", QWEN3_235B_A22B, 235_093_634_560, 22_190_763_520, 40_960),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", QWEN3_CODER_30B_A3B, 30_532_122_624, 3_353_032_704, 262_144),
        ("Qwen/Qwen2.5-7B-Instruct-1M", QWEN25_7B_1M, 7_615_616_512, 7_615_616_512, 1_010_000),
    ],
)
def test_published_models_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, published: dict[str, object], parameters: int,
    active: int, context: int,
):  # fmt: skip
    """Sizes of the weights as their model cards and indexes have them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache_entry(tmp_path, name, {"config.json": json.dumps(published).encode()})
    given = load_subject(Path(name), "cuda")
    assert given.max_model_len == context
    plan = make_plan(given, 4096, have_target(load_hardware(None), "8x141GB"))
    assert (plan["model"]["parameters"], plan["model"]["active_parameters"]) == (parameters, active)
    assert plan["fits"]
