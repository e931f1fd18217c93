"""Configuration of long contexts: dual chunk attention, sparse prefill, int8 KV, and how they fit into each other."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.common.errors import PreflightError
from cluster.config.attention import DualChunk, SparseSection
from cluster.config.deployment import ConfigError, Deployment, load_config, load_deployment
from cluster.config.memory_budget import kv_dtype, kv_token_bytes
from cluster.config.topology import kv_bytes_per_token, plan_shards
from cluster.engine.pipeline import cache_root
from cluster.engine.runtime import ClusterRuntime
from cluster.stages.preflight import check_room
from protos.jobs.sampling import AnswerOptions, SamplingParams
from protos.model.spec import DualChunkSpec, HeadBudget, SparseSpec
from tests.support.paths import NEEDLE
from tests.support.rigs.scheduler import PLAIN

BASE = f"""\
model:
  path: {NEEDLE}
  config_file: config_1m.json
prefill:
  max_num_batched_tokens: 3584
kv_cache:
  bytes: 2GiB
  page_size: 64
sparse:
  enabled: auto
"""
DUAL = {"chunk_size": 4096, "local_size": 512}


def deploy(tmp_path: Path, text: str = BASE, **overrides: object) -> Deployment:
    path = tmp_path / "long.yaml"
    path.write_text(text)
    return load_deployment(path, {key.replace("__", "."): value for key, value in overrides.items()})


def test_the_recipe_of_the_model_is_the_default(tmp_path: Path) -> None:
    deployment = deploy(tmp_path)
    assert deployment.spec.dual_chunk == DualChunkSpec(4096, 512, 4096)
    assert deployment.spec.sparse is not None
    assert (deployment.spec.sparse.threshold, deployment.spec.sparse.last_q) == (8192, 64)
    assert deployment.max_model_len == deployment.spec.default_context == 1_048_576
    assert deploy(tmp_path, BASE.replace("  config_file: config_1m.json\n", "")).spec == PLAIN


def test_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {path: x}\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.model.config_file, config.model.dual_chunk_attention) == ("config.json", None)
    assert (config.kv_cache.dtype, config.sparse.enabled, config.sparse.synthetic) == ("auto", "auto", False)
    assert config.sparse.as_mapping() == {"synthetic": False}


def test_every_setting_of_the_model_has_a_key() -> None:
    sparse = {field.name for field in fields(SparseSpec)} - {"patterns", "uniform"}
    budget = {field.name for field in fields(HeadBudget)}
    assert set(SparseSection.model_fields) == {"enabled"} | sparse | budget
    assert list(DualChunk.model_fields) == ["enabled", *(field.name for field in fields(DualChunkSpec))]


def test_what_the_yaml_says_goes_before_the_file(tmp_path: Path) -> None:
    assert deploy(tmp_path, sparse__enabled=False).spec.sparse is None
    off = deploy(tmp_path, model__dual_chunk_attention=False, sparse__cell="4K", prefill__max_num_batched_tokens=4096)
    assert off.spec.dual_chunk is None
    assert off.spec.sparse is not None
    assert off.spec.sparse.cell == 4096
    other = deploy(tmp_path, model__dual_chunk_attention={"chunk_size": "3K", "original_max_position_embeddings": 0})
    assert other.spec.dual_chunk == DualChunkSpec(3072, 512, 0)
    plain = BASE.replace("config_1m.json", "config.json")
    added = deploy(tmp_path, plain, model__dual_chunk_attention=DUAL, sparse={"enabled": True, "threshold": 0})
    assert (added.spec.dual_chunk, added.max_model_len) == (DualChunkSpec(4096, 512), 4 * 4096)
    assert added.spec.sparse is not None
    assert (added.spec.sparse.threshold, added.spec.sparse.is_adaptive, added.spec.sparse.recall_floor) == (
        0,
        True,
        0.9,
    )
    fixed = deploy(tmp_path, sparse={"n_vertical": 1000, "n_slash": 6096}).spec.sparse
    assert fixed is not None
    assert fixed.uniform == HeadBudget(1000, 6096)


def test_patterns_beside_config_json_switch_sparse_prefill_on(tmp_path: Path) -> None:
    config = json.loads((NEEDLE / "config_1m.json").read_text())
    recipe = config["dual_chunk_attention_config"]
    recipe.pop("sparse_attention_enabled")
    (tmp_path / "config.json").write_text(json.dumps(config))
    heads = {str(head): ["vertical_and_slash", 100, 200, 1.0] for head in range(4)}
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps([heads] * 4))
    text = BASE.replace(f"path: {NEEDLE}", f"path: {tmp_path}").replace("config_1m.json", "config.json")
    sparse = deploy(tmp_path, text).spec.sparse
    assert sparse is not None
    assert sparse.patterns == ((HeadBudget(100, 200),) * 4,) * 4
    assert deploy(tmp_path, text, sparse__enabled=False).spec.sparse is None
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"dual_chunk_attention_config": recipe | {"sparse_attention_enabled": False}})
    )
    assert deploy(tmp_path, text).spec.sparse is None
    forced = deploy(tmp_path, text, sparse__enabled=True).spec.sparse
    assert forced is not None
    assert forced.patterns == sparse.patterns


BAD: list[tuple[dict[str, object], str]] = [
    ({"sparse.enabled": 1}, "^<override>: sparse.enabled: 1: must be one of auto, true, false$"),
    ({"sparse.enabled": "on"}, "^<override>: sparse.enabled: \"?on\"?: must be one of auto, true, false$"),
    ({"sparse.threshold": -1}, "^<override>: sparse.threshold: -1: must be a whole number such as"),
    ({"sparse.last_q": 0}, "^<override>: sparse.last_q: 0: must be a whole number from 1 to 1024$"),
    ({"sparse.cell": 0}, "^<override>: sparse.cell: 0: must be a whole number such as .* at most 1M$"),
    ({"sparse.cell": "2M"}, "^<override>: sparse.cell: 2M: must be a whole number such as .* at most 1M$"),
    ({"sparse.n_slash": 5}, "^.*: sparse.n_vertical: .missing.: sparse.n_vertical and sparse.n_slash go together; "),
    ({"sparse": {"n_vertical": 5, "n_slash": 5, "target_recall": 0.9}},
     "^<override>: sparse.target_recall: 0.9: give either a recall or n_vertical with n_slash, not both$"),
    ({"sparse.n_vertical": 5}, "^.*: sparse.n_slash: .missing.: sparse.n_vertical and sparse.n_slash go together; "),
    ({"sparse": {"n_vertical": 0, "n_slash": 5}}, "^<override>: sparse.n_vertical: 0: must be a whole number of at l"),
    ({"sparse": {"n_vertical": 5, "n_slash": 1 << 25}}, "^<override>: sparse.n_slash: 33554432: must be a whole numb"),
    ({"sparse.max_dense_share": -1}, "^<override>: sparse.max_dense_share: -1: must be a number from 0 to 1$"),
    ({"sparse.target_recall": 1.1}, "^<override>: sparse.target_recall: 1.1: must be a number above 0 and at most 1$"),
    ({"sparse.target_recall": 0.0}, "^<override>: sparse.target_recall: 0.0: must be a number above 0 and at most 1$"),
    ({"sparse.recall_floor": 1.01}, "^<override>: sparse.recall_floor: 1.01: must be a number from 0 to 1 .0: off.$"),
    ({"sparse.max_dense_share": float("nan")}, "^<override>: sparse.max_dense_share: nan: must be a number from 0 to"),
    ({"sparse.synthetic": "no"}, "^<override>: sparse.synthetic: \"?no\"?: must be true or false$"),
    ({"sparse.cells": 1}, "^<override>: sparse.cells: 1: unknown key; did you mean 'cell'"),
    ({"kv_cache.dtype": "int4"}, "^<override>: kv_cache.dtype: int4: must be one of auto, int8, fp8$"),
    ({"kv_cache.dtype": "fp8"}, "^<override>: kv_cache.dtype: fp8: fp8 needs cluster.device: cuda; use int8, which ta"),
    ({"model.config_file": "../config.json"}, "^<override>: model.config_file: ../config.json: must be the name of a"),
    ({"model.config_file": ".."}, "^<override>: model.config_file: ..: must be the name of a file in model.path"),
    ({"model.config_file": "none.json"}, "^<override>: model.config_file: none.json: .*none.json: cannot be read"),
    ({"model.dual_chunk_attention": True}, "^<override>: model.dual_chunk_attention: true: must be false, or a map"),
    ({"model.dual_chunk_attention": {"chunk_size": 1}},
     "^<override>: model.dual_chunk_attention.chunk_size: 1: must be a whole number .* at least 2$"),
    ({"model.dual_chunk_attention": {"chunk_size": 512, "local_size": 512}},
     "^<override>: model.dual_chunk_attention.local_size: 512: must be below chunk_size .512.$"),
    ({"model.dual_chunk_attention": {"chunk_size": "2M"}},
     "^<override>: model.dual_chunk_attention: .a mapping of 1.: chunk_size: 2097152: must be at most 1048576"),
    ({"model.dual_chunk_attention": {"enabled": "yes"}}, "attention.enabled: \"?yes\"?: must be true or false$"),
    ({"model.dual_chunk_attention": {"chunk_sizes": 1}}, "unknown key; did you mean 'chunk_size'"),
    ({"model.dual_chunk_attention": {"local_size": 500}},
     "^.*:8: kv_cache.page_size: 64: must divide 3596, the distance of DCA chunks .chunk_size 4096 - local_size 500.; "
     "use a smaller page, or another model.dual_chunk_attention$"),
    ({"sparse.cell": 1000},
     "^<override>: sparse.cell: 1000: must be a multiple of kv_cache.page_size .64.*smaller page$"),
    ({"prefill.max_num_batched_tokens": 3583, "sparse.cell": "8K"},
     "^<override>: prefill.max_num_batched_tokens: 3583: must be at least 3584, the largest cell of sparse prefill; "
     "raise it, lower sparse.cell, or say sparse.enabled: false$"),
    ({"sparse.cell": 2048, "prefill.max_num_batched_tokens": 2047}, "must be at least 2048, the largest cell"),
    ({"model.config_file": "config.json", "model.max_model_len": 4097},
     "^<override>: model.max_model_len: 4097: must be between 1 and 4096 .4K., which the positions cover; three ways "
     "out: YaRN .model.rope_scaling .*, dual chunk attention .model.dual_chunk_attention., or a shorter document$"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=range(len(BAD)))
def test_bad_values_are_one_line(tmp_path: Path, overrides: dict[str, object], expected: str) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load_deployment(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [({}, 3584), ({"sparse.cell": 2048}, 2048), ({"sparse.enabled": False}, 1), ({"sparse.cell": "1M"}, 3584)],
)
def test_the_largest_cell_bounds_the_step_from_below(tmp_path: Path, overrides: dict[str, object], tokens: int) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(BASE)
    assert load_deployment(path, overrides | {"prefill.max_num_batched_tokens": tokens})


# --- int8 -------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_token(tmp_path: Path) -> None:
    """Needle: 4 layers, 2 KV heads, head dim 64; keys and values; int8 has a float32 scale a key and value."""
    assert kv_token_bytes(deploy(tmp_path)) == 2 * 4 * 2 * 64 * 2
    assert kv_token_bytes(deploy(tmp_path, model__dtype="float32")) == 2 * 4 * 2 * 64 * 4
    assert kv_token_bytes(deploy(tmp_path, kv_cache__dtype="int8")) == 2 * 4 * 2 * (64 + 4)
    split = deploy(tmp_path, kv_cache__dtype="int8", cluster__pipeline_parallel_size=2, cluster__expert_parallel_size=2)
    assert kv_token_bytes(split) == 2 * 2 * 1 * (64 + 4)
    shard = plan_shards(PLAIN, 1, 1)[0]
    assert kv_bytes_per_token(PLAIN, shard, 1, 4) == 2 * 4 * 2 * 68
    assert [kv_dtype(deploy(tmp_path, kv_cache__dtype=dtype)) for dtype in ("auto", "int8")] == ["bfloat16", "int8"]
    fp8 = deploy(tmp_path, kv_cache__dtype="fp8", cluster__device="cuda")
    assert kv_dtype(fp8) == "fp8"
    assert kv_token_bytes(fp8) == 2 * 4 * 2 * (64 + 4)


def test_int8_makes_room(tmp_path: Path) -> None:
    small = {"model__max_model_len": 64_000}
    budget = 64_000 * 2 * 4 * 2 * 68
    assert check_room(deploy(tmp_path, kv_cache__dtype="int8", **small), budget) == 1000
    with pytest.raises(PreflightError, match=r"room for \d+ tokens .*, or say kv_cache.dtype: int8$"):
        check_room(deploy(tmp_path, **small), budget)
    with pytest.raises(PreflightError, match=r"or lower max_model_len$"):
        check_room(deploy(tmp_path, kv_cache__dtype="int8", **small), budget - 1)


# --- what results depend on -------------------------------------------------------------------------------------------


def test_cache_root_names_everything_kv_depends_on(tmp_path: Path) -> None:
    base = deploy(tmp_path)
    others = [
        deploy(tmp_path, kv_cache__dtype="int8"),
        deploy(tmp_path, model__dtype="float32"),
        deploy(tmp_path, sparse__enabled=False),
        deploy(tmp_path, sparse__threshold=0),
        deploy(tmp_path, sparse__target_recall=0.9),
        deploy(tmp_path, sparse__cell=2048),
        deploy(tmp_path, model__dual_chunk_attention={"local_size": 1024}),
        deploy(tmp_path, model__dual_chunk_attention={"original_max_position_embeddings": 0}),
    ]
    roots = [cache_root(deployment, "f") for deployment in (base, *others)] + [cache_root(base, "g")]
    assert len(set(roots)) == len(roots)
    longer = replace(base, max_model_len=5, config=base.config)
    assert cache_root(longer, "f") == roots[0]


def test_a_result_names_positions_sparse_mode_and_kv_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = ClusterRuntime(deploy(tmp_path, kv_cache__dtype="int8"))
    monkeypatch.setattr(ClusterRuntime, "launched", SimpleNamespace(fingerprint="f", dtype="bfloat16"))
    facts = runtime.reproducibility(AnswerOptions(sampling=SamplingParams(seed=7)), [[1, 2], [1, 2, 3]])
    assert facts["positions"] == "default, theta 200000, factor 1, dual chunk 4096/512 of 4096"
    assert facts["sparse_mode"].startswith("vertical-slash above 8192 tokens, cells of 8192, last 64, recall 0.95")
    assert (facts["dtype"], facts["kv_dtype"], facts["seed"]) == ("bfloat16", "int8", 7)
    assert facts["sampling"] == SamplingParams(seed=7).to_json()
    assert facts["scale_len"] == 3, "the longest prompt of the job"
