"""What a YAML file leaves out fits what it gives: any keys that are valid and fit one another load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.deployment import ConfigError, load_deployment
from protos.model.grid import largest_cell
from tests.support.paths import CONFIGS, NEEDLE

VALUES: dict[str, list[Any]] = {
    "model.config_file": ["config.json", "config_1m.json"],
    "model.max_model_len": [1, 100, 4096],
    "model.dual_chunk_attention": [
        None, False, {"chunk_size": 4096, "local_size": 512}, {"chunk_size": 100, "local_size": 35},
        {"chunk_size": 3000, "local_size": 500},
    ],
    "cluster.pipeline_parallel_size": [1, 2, 4],
    "cluster.expert_parallel_size": [1, 2],
    "prefill.max_num_batched_tokens": [1, 17, 64, 100, 2048, 3583, 4096, 1 << 24],
    "prefill.max_num_seqs": [1, 65536],
    "sparse.enabled": ["auto", True, False],
    "sparse.cell": [1, 48, 1000, 2048, 8192, 1 << 20],
    "sparse.threshold": [0, 100_000],
    "sparse.last_q": [1, 1024],
    "kv_cache.page_size": [1, 16, 64, 1024],
    "kv_cache.dtype": ["int8"],
    "kv_store.block_tokens": [1, 256, 4096],
    "kv_cache.fraction": [0.9],
}  # fmt: skip
KEYS = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in VALUES.items()})


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bare") / "bare.yaml"
    path.write_text(f"model:\n  path: {NEEDLE}\n")
    return path


def fit_one_another(keys: dict[str, Any], distance: int) -> bool:
    """Whether the given sizes agree under sparse prefill with DCA chunks of `distance` (0: none)."""
    page, cell, step = (
        keys.get(key) for key in ("kv_cache.page_size", "sparse.cell", "prefill.max_num_batched_tokens")
    )
    if page is not None and cell is not None and cell % page:
        return False
    smallest = cell or page or 1  # cells are whole pages
    return step is None or step >= min(smallest, distance or smallest)


@settings(max_examples=300, deadline=None)
@given(keys=KEYS)
def test_keys_that_fit_one_another_load(bare: Path, keys: dict[str, Any]) -> None:
    probe = {key: keys[key] for key in keys if key.startswith("model.") or key == "sparse.enabled"}
    spec = load_deployment(bare, probe).spec
    page, distance = keys.get("kv_cache.page_size"), spec.chunk_distance
    fits = not (page and (distance % page or keys.get("kv_store.block_tokens", 4096) % page))
    fits = fits and (spec.sparse is None or fit_one_another(keys, distance))
    if not fits:
        with pytest.raises(ConfigError, match=r"must be a multiple of|must divide|must be at least"):
            load_deployment(bare, keys)
        return
    loaded = load_deployment(bare, keys)
    config, spec = loaded.config, loaded.spec
    assert config.kv_cache.page_size == keys.get("kv_cache.page_size", config.kv_cache.page_size)
    step = config.prefill.max_num_batched_tokens
    assert step == keys.get("prefill.max_num_batched_tokens", max(2048, largest_cell(spec)))
    assert config.kv_cache.page_size.bit_count() == 1
    assert config.kv_store.block_tokens == keys.get("kv_store.block_tokens", max(512, config.kv_cache.page_size))
    assert config.kv_store.block_tokens % config.kv_cache.page_size == 0
    assert spec.chunk_distance % config.kv_cache.page_size == 0
    if spec.sparse is not None:
        assert spec.sparse.cell == keys.get("sparse.cell", spec.sparse.cell)
        assert spec.sparse.cell % config.kv_cache.page_size == 0
        assert step >= largest_cell(spec)


def test_what_nothing_asks_to_be_changed_is_usual(bare: Path) -> None:
    plain = load_deployment(bare)
    assert (plain.config.prefill.max_num_batched_tokens, plain.config.kv_cache.page_size) == (2048, 64)
    long = load_deployment(bare, {"model.config_file": "config_1m.json"})
    assert long.spec.sparse is not None
    assert (long.config.prefill.max_num_batched_tokens, long.spec.sparse.cell) == (3584, 8192)
    small = load_deployment(bare, {"sparse.enabled": True, "prefill.max_num_batched_tokens": 1000})
    assert small.spec.sparse is not None
    assert (small.config.kv_cache.page_size, small.spec.sparse.cell) == (64, 960)


def test_published_files_keep_their_sizes() -> None:
    demo = load_deployment(CONFIGS / "demo.yaml")
    assert demo.spec.sparse is not None
    assert (demo.config.prefill.max_num_batched_tokens, demo.spec.sparse.cell) == (4096, 8192)
