"""A pipeline from its launcher to its end: in order, and with nothing left when a part of it fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.common.errors import EngineError, StageError
from cluster.config.deployment import load_deployment
from cluster.engine.pipeline import CannotRepair, Pipeline, cache_root, launch_pipeline
from cluster.kv_store.store import KvStore
from cluster.stages import launcher as launcher_module
from cluster.stages.ray_cluster import RayCluster
from cluster.text.tokenizer import TextTokenizer
from tests.support.data.specs import generation_spec
from tests.support.data.tokenizers import sentencepiece_like, wrap
from tests.support.fakes.stage import WAIT, Clock, FakeShard, eventually, submit
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


def test_the_next_pipeline_knows_what_this_one_has_learned_of_times(launch: Any) -> None:
    first: Pipeline = launch()
    submit(first.engine, generation_spec([5, 6], 3)).wait(WAIT)
    first.close()
    steps = first.engine.latency.num_steps
    second: Pipeline = launch()
    assert second.engine.latency.num_steps == steps > 0
    assert second.engine.latency.coefficients == first.engine.latency.coefficients
    second.close()


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


# --- repairs ---------------------------------------------------------------------------------------------------------


class TwoStages:
    """A launcher of two fake stages, which can be repaired."""

    def __init__(self, deployment: object, ray: object, on_status: object) -> None:
        self.clock = Clock()
        self.repaired: list[frozenset[int]] = []
        self.error: Exception | None = None
        self.closed = 0
        type(self).made = self

    made: TwoStages

    def start(self) -> Any:
        self.shards = [FakeShard(stage, 2, lambda sequence, index: 100 + index, self.clock) for stage in (0, 1)]
        return self._launched(1)

    def repair(self, launched: Any, stages: frozenset[int]) -> Any:
        self.repaired.append(stages)
        if self.error is not None:
            self.close()
            raise self.error
        for shard in self.shards:
            shard.disconnect()
        for stage in stages:
            self.shards[stage] = FakeShard(stage, 2, lambda sequence, index: 100 + index, self.clock)
        return self._launched(launched.epoch + 1)

    def _launched(self, epoch: int) -> Any:
        return SimpleNamespace(
            shards=tuple(self.shards),
            num_pages=64,
            fingerprint="f",
            dtype="float32",
            pids=(1, 2),
            epoch=epoch,
            kernel_family="f",
        )

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pipeline]:
    monkeypatch.setattr(launcher_module, "Launcher", TwoStages)
    settings = {"data_dir": str(tmp_path), "cluster.pipeline_parallel_size": 2}
    deployment = load_deployment(CONFIGS / "single.yaml", settings)
    tokenizer, store = TextTokenizer.open(NEEDLE), KvStore(deployment.config.kv_store, is_enabled=False)
    pipeline = launch_pipeline(deployment, tokenizer, RayCluster("local"), lambda status: None, store)
    yield pipeline
    pipeline.close()


def fail(pipeline: Pipeline, error: str, stages: Iterable[int] = ()) -> None:
    pipeline.engine.fail(error, stages)
    eventually(lambda: bool(pipeline.engine.error))


def test_the_engine_is_made_anew_over_the_same_pages(two: Pipeline) -> None:
    launcher, (first, second) = TwoStages.made, TwoStages.made.shards
    prompt = generation_spec([5 + i % 7 for i in range(600)], 3)
    assert submit(two.engine, prompt).wait(WAIT).token_ids == (100, 101, 102)
    pool = two.engine.scheduler.pool
    assert pool.published()
    second.hold()
    handle = submit(two.engine, generation_spec([9, 9], 3))
    second.lose("stage 1 shard 0 is gone")
    with pytest.raises(EngineError):
        handle.wait(WAIT)
    assert two.engine.lost_stages == {1}
    assert two.repair is not None
    repaired = two.repair()
    assert launcher.repaired == [frozenset({1})]
    assert (repaired.launched.epoch, repaired.launched.shards[0]) == (2, first)
    assert repaired.engine.scheduler.pool is pool
    assert (pool.usage, pool.published()) == (0.0, []), "the new stage has none of the pages"
    assert repaired.engine.latency is two.engine.latency
    assert submit(repaired.engine, prompt).wait(WAIT).token_ids == (100, 101, 102)
    assert (first.closed, launcher.closed) == (0, 0)
    repaired.close()
    assert (first.closed, launcher.closed) == (1, 1)


def test_a_stage_that_failed_by_itself_is_found(two: Pipeline) -> None:
    """The error that came first is that of a neighbour."""
    TwoStages.made.shards[1].state = "failed"
    fail(two, "stage 0 shard 0, step 7: the last stage is gone")
    assert two.repair is not None
    two.repair().close()
    assert TwoStages.made.repaired == [frozenset({1})]


def test_two_of_two_stages_are_started_anew(two: Pipeline) -> None:
    fail(two, "hung", (0, 1))
    assert two.repair is not None
    with pytest.raises(CannotRepair, match="2 of 2 stages are broken"):
        two.repair()
    assert TwoStages.made.repaired == []


def test_where_no_stage_is_broken_all_are_linked_again(two: Pipeline) -> None:
    prompt = generation_spec([5 + i % 7 for i in range(600)], 3)
    assert submit(two.engine, prompt).wait(WAIT).token_ids == (100, 101, 102)
    fail(two, "stage 1 shard 0, step 7: link to the next stage broke")
    assert two.repair is not None
    repaired = two.repair()
    assert TwoStages.made.repaired == [frozenset()]
    assert repaired.engine.scheduler.pool.published() == [], "nobody knows what went wrong"
    assert submit(repaired.engine, prompt).wait(WAIT).token_ids == (100, 101, 102)
    repaired.close()


def test_without_ray_nothing_is_repaired(two: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayCluster, "lost", "gcs_server ended")
    fail(two, "gcs_server ended", [0])
    assert two.repair is not None
    with pytest.raises(CannotRepair, match="gcs_server ended"):
        two.repair()


def test_a_repair_that_fails_can_be_closed(two: Pipeline) -> None:
    TwoStages.made.error = StageError("no weights")
    fail(two, "lost", [0])
    assert two.repair is not None
    with pytest.raises(StageError, match="no weights"):
        two.repair()
    two.close()
    assert TwoStages.made.closed == 2


def test_one_stage_cannot_be_repaired(launch: Any) -> None:
    pipeline: Pipeline = launch()
    assert pipeline.repair is None
    pipeline.close()


@pytest.mark.parametrize(
    ("lost", "stages", "flushes"),
    [("gcs_server ended", (), True), ("gcs_server ended", (1,), False), ("", (), False)],
)
def test_what_is_computed_is_stored_when_only_ray_is_lost(
    two: Pipeline, monkeypatch: pytest.MonkeyPatch, lost: str, stages: tuple[int, ...], flushes: bool
) -> None:
    flush_s: list[float] = []
    monkeypatch.setattr(KvStore, "detach", lambda self, flush=10.0, *_, **__: flush_s.append(flush) is None)
    monkeypatch.setattr(RayCluster, "lost", lost)
    fail(two, lost or "the engine failed", stages)
    if lost:
        assert two.repair is not None
        with pytest.raises(CannotRepair, match="gcs_server ended"):
            two.repair()
    two.close()
    assert [seconds > 0 for seconds in flush_s] == [flushes]
