"""A pipeline from its launcher to its end: in order, and with nothing left when a part of it fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.common.errors import StageError
from cluster.config.deployment import load_deployment
from cluster.engine.pipeline import Pipeline, cache_root, launch_pipeline
from cluster.kv_store.store import KvStore
from cluster.stages import launcher as launcher_module
from cluster.stages.ray_cluster import RayCluster
from cluster.text.tokenizer import TextTokenizer
from tests.support.data.specs import generation_spec
from tests.support.data.tokenizers import sentencepiece_like, wrap
from tests.support.fakes.stage import WAIT, Clock, FakeShard, submit
from tests.support.paths import CONFIGS, NEEDLE


class FakeLauncher:
    """Launches one fake shard, or fails; writes down what happens."""

    log: list[str]
    fails_at = ""

    def __init__(self, deployment: object, ray: object, on_status: object) -> None:
        type(self).log = []

    def start(self) -> Any:
        if self.fails_at == "launch":
            raise StageError("no stage")
        shard = FakeShard(0, 1, lambda sequence, index: 100 + index, Clock())
        close, connect = shard.close, shard.connect

        def closing() -> None:
            self.log.append("shard closed")
            close()

        def connecting(*callbacks: Any) -> None:
            if self.fails_at == "connect":
                raise StageError("no connection")
            connect(*callbacks)

        shard.close, shard.connect = closing, connecting  # type: ignore[method-assign]
        return SimpleNamespace(
            shards=(shard,), num_pages=64, fingerprint="f", dtype="float32", pids=(1,), kernel_family="fake"
        )

    def close(self) -> None:
        self.log.append("launcher closed")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(launcher_module, "Launcher", FakeLauncher)
    deployment = load_deployment(CONFIGS / "single.yaml", {"data_dir": str(tmp_path)})

    def start(fails_at: str = "") -> Pipeline:
        monkeypatch.setattr(FakeLauncher, "fails_at", fails_at)
        tokenizer, store = TextTokenizer.open(NEEDLE), KvStore(deployment.config.kv_store)
        return launch_pipeline(deployment, tokenizer, RayCluster("local"), lambda status: None, store)

    return start


def test_a_pipeline_answers_and_stops_in_order(launch: Any) -> None:
    pipeline: Pipeline = launch()
    assert submit(pipeline.engine, generation_spec([5, 6], 3)).wait(WAIT).token_ids == (100, 101, 102)
    assert (pipeline.engine.scheduler.pool.num_pages, pipeline.launched.fingerprint) == (64, "f")
    pipeline.close()
    assert FakeLauncher.log == ["shard closed", "launcher closed"]
    pipeline.close()
    assert FakeLauncher.log == ["shard closed", "launcher closed"]


def test_the_end_token_of_the_tokenizer_ends_answers_too(monkeypatch: pytest.MonkeyPatch, launch: Any) -> None:
    monkeypatch.setattr(TextTokenizer, "open", lambda path: wrap(sentencepiece_like(), eos_token="<0x66>"))
    pipeline: Pipeline = launch()  # samples 100, 101, ...; the byte token of 0x66 is 105
    assert submit(pipeline.engine, generation_spec([5, 6], 30)).wait(WAIT).token_ids == tuple(range(100, 106))
    pipeline.close()


@pytest.mark.parametrize(
    ("fails_at", "log"), [("launch", ["launcher closed"]), ("connect", ["shard closed", "launcher closed"])]
)
def test_nothing_is_left_of_a_start_that_fails(launch: Any, fails_at: str, log: list[str]) -> None:
    with pytest.raises(StageError):
        launch(fails_at)
    assert FakeLauncher.log == log


@pytest.mark.parametrize(
    ("overrides", "is_same"),
    [
        ({"prefill.max_num_batched_tokens": 64, "prefill.max_num_seqs": 2}, True),
        ({"kv_cache.page_size": 16, "kv_store.block_tokens": 64}, True),
        ({"cluster.pipeline_parallel_size": 2, "cluster.expert_parallel_size": 2}, True),
        ({"cluster.expert_parallel_size": 4}, True),
        ({"model.max_model_len": 100, "model.allow_beyond_positions": True}, True),
        ({"model.dtype": "float32"}, False),
        ({"kv_cache.dtype": "int8"}, False),
        ({"sparse.enabled": True}, False),
        ({"sparse.enabled": True, "sparse.n_vertical": 500, "sparse.n_slash": 100}, False),
        ({"model.rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, False),
        ({"model.dual_chunk_attention": {"chunk_size": 1024, "local_size": 64}}, False),
    ],
)
def test_keys_depend_on_what_is_computed_and_not_on_where(overrides: dict[str, object], is_same: bool) -> None:
    def root(given: dict[str, object], fingerprint: str = "f") -> bytes:
        return cache_root(load_deployment(CONFIGS / "single.yaml", given), fingerprint)

    assert (root(overrides) == root({})) is is_same
    assert root(overrides) != root(overrides, "another checkpoint")


def test_shards_that_split_a_kv_head_matter_where_heads_may_fall_back_to_dense_attention() -> None:
    def root(shards: int, floor: float) -> bytes:
        sparse = {"sparse.enabled": True, "sparse.target_recall": 0.9, "sparse.recall_floor": floor}
        return cache_root(
            load_deployment(CONFIGS / "single.yaml", sparse | {"cluster.expert_parallel_size": shards}), "f"
        )

    assert root(2, 0.8) == root(1, 0.8) != root(4, 0.8)
    assert root(2, 0.0) == root(4, 0.0)
