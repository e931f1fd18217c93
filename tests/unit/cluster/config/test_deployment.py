"""A configuration against its model: layout, context length, and faults of the model directory."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.config.deployment import ConfigError, fetch_model, load_config, load_deployment
from protos.model.config_json import load_model_spec
from protos.stage.messages import Span
from tests.support.data.checkpoints import make_checkpoint
from tests.support.gguf_files import convert
from tests.support.hub.cached import cache_entry
from tests.support.hub.stand_in import COMMIT
from tests.support.paths import CONFIGS

NEEDLE = CONFIGS / "needle"
BASE = """\
model:
  path: needle
  max_model_len: 4k
cluster:
  pipeline_parallel_size: 2
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    return path


def test_demo_deployment() -> None:
    deployment = load_deployment(CONFIGS / "demo.yaml", {"model.max_model_len": None})
    assert deployment.max_model_len == deployment.spec.default_context == 1 << 20
    assert [shard.layers for shard in deployment.shards] == [Span(0, 2), Span(0, 2), Span(2, 4), Span(2, 4)]
    assert [shard.experts for shard in deployment.shards[:2]] == [Span(0, 8), Span(8, 16)]


def deployment_error(path: Path, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_deployment(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).replace(str(path.parent) + "/", "")


def on_needle(tmp_path: Path, text: str) -> Path:
    return write(tmp_path, text.replace("path: needle", f"path: {NEEDLE}"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE.replace("size: 2", "size: 9"),
         "^demo.yaml:5: cluster.pipeline_parallel_size: 9: must be between 1 and 4 .the model has 4 layers.$"),
        (BASE.replace("pipeline_parallel_size: 2", "expert_parallel_size: 3"),
         "^demo.yaml:5: cluster.expert_parallel_size: 3: must be one of 1, 2, 4 .*16 experts.$"),
        (BASE.replace("4k", "4097"),
         "^demo.yaml:3: model.max_model_len: 4097: must be between 1 and 4096 .*YaRN.*shorter document$"),
        (BASE.replace("4k", "1m"), "^demo.yaml:3: model.max_model_len: 1m: must be between 1 and 4096 "),
        (BASE.replace("  max", "  rope_scaling: {rope_type: yarn, factor: 2, beta_fast: 1, beta_slow: 2}\n  max"),
         "^demo.yaml:3: model.rope_scaling: .a mapping of 4.: beta_fast: "),
    ],
)  # fmt: skip
def test_what_the_model_does_not_allow(tmp_path: Path, text: str, expected: str) -> None:
    assert re.search(expected, message := deployment_error(on_needle(tmp_path, text))), message


def test_model_directory_is_named(tmp_path: Path) -> None:
    message = deployment_error(write(tmp_path, BASE))
    assert message == "demo.yaml:2: model.path: needle: there is no directory needle; it must hold config.json"
    (tmp_path / "needle").mkdir()
    assert deployment_error(write(tmp_path, BASE)).startswith("demo.yaml:2: model.path: needle: needle/config.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("needle", "a file, not a folder: name the folder that holds"),
        ("m.gguf", "m.gguf: not a GGUF file: download it again"),
    ],
)
def test_a_file_is_no_model_directory(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("")
    message = deployment_error(write(tmp_path, BASE.replace("path: needle", f"path: {name}")))
    assert message.startswith(f"demo.yaml:2: model.path: {name}: {said}")


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", "qwen3", num_hidden_layers=2, max_position_embeddings=8192)
    made = convert(folder, tmp_path / "Tiny-Q8_0.gguf")
    deployment = load_deployment(write(tmp_path, BASE.replace("path: needle", f"path: {made.name}")))
    assert replace(deployment.spec, sparse=None) == load_model_spec(folder)
    assert deployment.config.model.served_model_name == "Tiny-Q8_0"
    absent = deployment_error(write(tmp_path, BASE.replace("path: needle", "path: absent.gguf")))
    assert absent == "demo.yaml:2: model.path: absent.gguf: there is no file absent.gguf"


def test_an_entry_of_the_hugging_face_cache_is_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--needle-8m" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(NEEDLE)
    (tmp_path / "models--acme--needle-8m" / "refs").mkdir()
    (tmp_path / "models--acme--needle-8m" / "refs" / "main").write_text("0123abc\n")
    text = BASE.replace("path: needle", "path: models--acme--needle-8m")
    model = load_deployment(write(tmp_path, text)).config.model
    assert (model.path, model.served_model_name) == (snapshot, "needle-8m")
    named = load_deployment(write(tmp_path, text.replace("  max", "  served_model_name: mine\n  max"))).config.model
    assert named.served_model_name == "mine"


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"model_type": "t5"}', "\0"])
def test_a_broken_config_json_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "needle").mkdir()
    (tmp_path / "needle" / "config.json").write_text(content)
    assert deployment_error(write(tmp_path, BASE)).startswith("demo.yaml:2: model.path: needle: ")


@pytest.mark.parametrize("length", [1, 4095, 4096])
def test_lengths_within_positions(tmp_path: Path, length: int) -> None:
    assert load_deployment(on_needle(tmp_path, BASE.replace("4k", str(length)))).max_model_len == length


def test_ways_beyond_the_positions(tmp_path: Path) -> None:
    path = on_needle(tmp_path, BASE.replace("4k", "64k"))
    assert load_deployment(path, {"model.allow_beyond_positions": True}).max_model_len == 64_000
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    assert load_deployment(path, {"model.rope_scaling": yarn}).max_model_len == 64_000
    stretched = json.loads((NEEDLE / "config.json").read_text()) | {"max_position_embeddings": 65_536}
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "config.json").write_text(json.dumps(stretched))
    assert load_deployment(path, {"model.path": "long"}).max_model_len == 64_000


def test_a_block_of_stored_kv_holds_whole_pages(tmp_path: Path) -> None:
    path = on_needle(tmp_path, BASE + "kv_cache: {page_size: 64}\nkv_store: {block_tokens: 32}\n")
    assert deployment_error(path) == (
        "demo.yaml:7: kv_store.block_tokens: 32: must be a multiple of kv_cache.page_size (64), here 32; "
        "use larger blocks, or a smaller page"
    )
    large = load_deployment(on_needle(tmp_path, BASE), {"kv_cache.page_size": 1024})
    assert large.config.kv_store.block_tokens == 1024


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({}, "data/kv"), ({"kv_store.path": "shared"}, "shared"), ({"kv_store.enabled": False}, None),
        ({"model.load_format": "dummy"}, None),
    ],
)  # fmt: skip
def test_where_kv_is_stored(tmp_path: Path, overrides: dict[str, object], path: str | None) -> None:
    loaded = load_deployment(on_needle(tmp_path, BASE), {"data_dir": "data"} | overrides)
    assert loaded.kv_store_path == (tmp_path / path if path else None)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_model_named_as_on_a_hub_is_its_snapshot(tmp_path: Path, hub_cache: Path) -> None:
    files = {name: (NEEDLE / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}
    path = write(tmp_path, BASE.replace("path: needle", "path: org/needle@v1"))
    assert load_config(path).model.served_model_name == "needle@v1"  # not there yet, as for `longreach down`
    snapshot = cache_entry(hub_cache, "org/needle", files, branch="v1")
    deployment = load_deployment(path)
    assert deployment.config.model.path == load_config(path).model.path == snapshot
    assert deployment.config.model.served_model_name == "needle"
    fetch_model(path, {}, lambda phase, done, total: None)
    local = tmp_path / "org" / "needle@v1"
    local.mkdir(parents=True)
    assert load_config(path).model.path == local
    assert deployment_error(path).endswith(": the folder is empty: name the folder of a model")


def test_a_model_that_no_hub_gives_is_named_with_its_line(tmp_path: Path, hub_cache: Path) -> None:
    path = write(tmp_path, BASE.replace("path: needle", "path: org/needle"))
    said = "demo.yaml:2: model.path: org/needle: is not in the cache cache, and HF_HUB_OFFLINE forbids downloads: unset"
    assert deployment_error(path).startswith(said)
    cache_entry(hub_cache, "org/needle", {"config.json": (NEEDLE / "config.json").read_bytes()})
    assert "lacks model.safetensors.index.json, and HF_HUB" in deployment_error(path)
    assert load_deployment(path, need="config").spec.num_hidden_layers == 4
    (hub_cache / "models--org--needle" / "snapshots" / COMMIT / "tokenizer.json").write_text("{}")
    assert load_deployment(path, {"model.load_format": "dummy"}).spec.num_hidden_layers == 4
