"""A repair without Ray and processes: who is replaced, who is linked again, and what is left when it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.common.certificates import certificate_names
from cluster.common.errors import PlacementError, StageError
from cluster.config.deployment import load_deployment
from cluster.stages import launcher as launcher_module
from cluster.stages.launcher import Launched, Launcher, LaunchStatus, broken_stages
from protos.stage import stage_pb2 as pb
from protos.stage.identity import PrivateKey, shard_name
from protos.stage.messages import LoadProgress, ShardSpec, StageAddress, StageProcessSpec
from tests.support.paths import CONFIGS


class Log(list[str]):
    def take(self) -> list[str]:
        """Return what was noted since the last call, sorted: shards are called on several threads."""
        taken, self[:] = sorted(self), []
        return taken


class FakeActor:
    def __init__(self, ray: FakeRay, stage: int, rank: int) -> None:
        self.open = SimpleNamespace(remote=lambda spec, check: (ray, stage, rank, spec))
        self.request_certificate = SimpleNamespace(remote=PrivateKey().request)


class FakeRay:
    """Places actors on one node; `refusals` are the errors of the next calls."""

    is_local, lost = True, ""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.pid = 100
        self.refusals: list[PlacementError] = []
        self.specs: list[StageProcessSpec] = []  # that actors were opened with

    def connect(self) -> None:
        pass

    def cores_of_a_pipeline(self, num_stages: int) -> int:
        return 2

    def node_id(self) -> str:
        return "here"

    def place(self, actor: object, stages: int, ranks: int, cpus: float, gpus: float) -> list[list[FakeActor]]:
        return [[FakeActor(self, stage, rank) for rank in range(ranks)] for stage in range(stages)]

    def replace(self, actor: object, stage: int) -> list[FakeActor]:
        self.log.append(f"replace {stage}")
        return [FakeActor(self, stage, rank) for rank in range(2)]

    def call(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        if self.refusals:
            raise self.refusals.pop()
        return [asked if isinstance(asked, bytes) else self._open(asked[-1]) for asked in calls]

    def _open(self, spec: StageProcessSpec) -> StageAddress:
        self.pid += 1
        self.log.append(f"open {Path(spec.socket).name}")
        self.specs.append(spec)
        return StageAddress(f"unix:{spec.socket}", "" if self.is_local else f"10.0.0.1:{self.pid}", "here", self.pid)

    def serve(self, stages: set[int]) -> None:
        self.log.append(f"serve {sorted(stages)}")

    def release(self) -> None:
        self.log.append("release")


class FakeHandle:
    log: Log
    fails = ""  # the call that fails

    def __init__(self, shard: ShardSpec, address: str, token: str, identity: object = None) -> None:
        self.shard = shard
        self.name = f"s{shard.stage}r{shard.rank}"
        self.address, self.identity = address, identity
        self.state = "running"

    def _note(self, what: str, detail: str = "") -> None:
        self.log.append(f"{what} {self.name}{detail}")
        if self.fails == what:
            raise StageError(f"{self.name} fails")

    def load(self, request: pb.LoadRequest, timeout_s: float) -> Iterator[LoadProgress]:
        self._note("load", f" {Path(request.store_path).name}")
        yield LoadProgress(5, 5, True, 0, 1 << 33)

    def start(self, request: pb.StartRequest, timeout_s: float) -> None:
        self.graph_rows = request.graph_rows
        self._note("start", f" {request.epoch} {request.num_pages} {Path(request.upstream_socket).name}")

    def relink(self, request: pb.StartRequest, timeout_s: float) -> None:
        store, link = Path(request.store_path).name, Path(request.downstream_socket).name
        self._note("relink", f" {request.epoch} {store} {link}")

    def probe(self, timeout_s: float) -> pb.ProbeReply:
        if self.state == "silent":
            raise StageError("no answer")
        return pb.ProbeReply(state=self.state, error="the previous stage is gone")

    def disconnect(self) -> None:
        self._note("disconnect")

    def abandon(self) -> None:
        self._note("abandon")

    def close(self) -> None:
        self.log.append(f"close {self.name}")


class Scene:
    def __init__(self, tmp_path: Path, is_local: bool = True, **cluster: object) -> None:
        self.log, self.said = FakeHandle.log, list[LaunchStatus]()
        self.ray: Any = FakeRay(self.log)
        self.ray.is_local = is_local
        settings = {
            "data_dir": str(tmp_path), "cluster.pipeline_parallel_size": 2, "cluster.expert_parallel_size": 2,
            "kv_cache.bytes": "1MiB",
        } | {f"cluster.{key}": value for key, value in cluster.items()}  # fmt: skip
        self.launcher = Launcher(load_deployment(CONFIGS / "single.yaml", settings), self.ray, self.said.append)
        self.launched: Launched = self.launcher.start()
        self.log.take()


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHandle, "log", Log(), raising=False)
    monkeypatch.setattr(launcher_module, "GrpcStageHandle", FakeHandle)
    monkeypatch.setattr(launcher_module, "_RETRY_S", 0.0)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.launcher.close()


@pytest.mark.parametrize("on", [True, False])
def test_graphs_have_room_for_all_requests_that_share_a_step(tmp_path: Path, on: bool) -> None:
    scene = Scene(tmp_path, cuda_graphs=on)
    rows = load_deployment(CONFIGS / "single.yaml").config.prefill.max_num_seqs if on else 0
    assert [handle.graph_rows for handle in scene.launched.shards] == [rows] * 4
    scene.launcher.close()


def test_one_stage_is_replaced_and_the_other_linked_again(scene: Scene) -> None:
    before = scene.launched
    after = scene.launcher.repair(before, {1})
    num = before.num_pages
    assert scene.log.take() == sorted([
        "disconnect s0r0", "disconnect s0r1", "abandon s1r0", "abandon s1r1", "replace 1",
        "open s1r0e2.sock", "open s1r1e2.sock", "serve [1]",
        "load s1r0 stage1e2.store", "load s1r1 stage1e2.store",
        f"start s1r0 2 {num} link0r0e2.sock", f"start s1r1 2 {num} link0r1e2.sock",
        "relink s0r0 2 stage0e2.store link0r0e2.sock", "relink s0r1 2 stage0e2.store link0r1e2.sock",
    ])  # fmt: skip
    assert after.shards[:2] == before.shards[:2]
    assert not set(after.shards[2:]) & set(before.shards)
    assert (before.pids, after.pids) == ((101, 102, 103, 104), (101, 102, 105, 106))
    assert (after.epoch, after.num_pages, after.fingerprint) == (2, num, before.fingerprint)
    assert [status.phase for status in scene.said if "replacing" in status.phase] == ["replacing stage 1"]
    half, whole = [said for said in scene.said if said.phase == "loading weights"][-2:]
    assert 0 < half.loaded_bytes < whole.loaded_bytes == whole.total_bytes
    at_first = max(said.total_bytes for said in scene.said)
    assert whole.total_bytes < at_first, "only what is new"
    again = scene.launcher.repair(after, {0})
    assert (again.epoch, again.pids) == (3, (107, 108, 105, 106))
    assert "relink s1r0 3 stage1e3.store link1r0e3.sock" in scene.log


def test_without_a_broken_stage_all_are_linked_again(scene: Scene) -> None:
    after = scene.launcher.repair(scene.launched, ())
    names = ("s0r0", "s0r1", "s1r0", "s1r1")
    done = [" ".join(line.split()[:2]) for line in scene.log.take()]
    assert done == [f"{what} {name}" for what in ("disconnect", "relink") for name in names]
    assert (after.epoch, after.shards, after.pids) == (2, scene.launched.shards, scene.launched.pids)


def test_a_place_is_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ray has given the actors to a node that is gone."""
    scene.ray.refusals = [PlacementError("an actor died: its node is gone")] * 2
    assert scene.launcher.repair(scene.launched, {0}).epoch == 2
    assert scene.log.count("replace 0") == 3
    waits = [status.phase for status in scene.said if status.phase.startswith("waiting")]
    assert waits == ["waiting for a node with room (an actor died: its node is gone)"] * 2
    scene.log.take()
    monkeypatch.setattr(launcher_module, "_REPLACE_TIMEOUT_S", -1.0)
    scene.ray.refusals = [PlacementError("no room")]
    with pytest.raises(PlacementError, match="no room"):
        scene.launcher.repair(scene.launched, {0})
    assert "release" in scene.log


def test_a_ray_that_is_lost_meanwhile_is_not_waited_for(scene: Scene) -> None:
    scene.ray.refusals, scene.ray.lost = [PlacementError("raylet ended")], "raylet ended"
    with pytest.raises(PlacementError, match="raylet ended"):
        scene.launcher.repair(scene.launched, {0})
    assert scene.log.count("replace 0") == 1


@pytest.mark.parametrize("fails", ["load", "start", "relink", "abandon"])
def test_nothing_is_left_of_a_repair_that_fails(scene: Scene, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHandle, "fails", fails)
    folder = scene.launcher._run_dir
    assert folder is not None
    with pytest.raises(StageError, match="fails"):
        scene.launcher.repair(scene.launched, {0})
    assert {line for line in scene.log if line.startswith("close")} == {
        f"close s{s}r{r}" for s in (0, 1) for r in (0, 1)
    }
    assert "release" in scene.log
    assert not folder.path.exists()


@pytest.mark.parametrize(
    ("states", "broken"),
    [
        (("running",) * 4, set()), (("running", "silent", "running", "running"), {0}),
        (("running", "running", "failed", "silent"), {1}), (("failed", "running", "running", "created"), {0, 1}),
    ],
)  # fmt: skip
def test_who_answers_and_has_not_failed_by_itself_is_sound(
    scene: Scene, states: tuple[str, ...], broken: set[int]
) -> None:
    shards: Any = scene.launched.shards
    for shard, state in zip(shards, states, strict=True):
        shard.state = state
    assert broken_stages(shards, 1.0) == broken


def names_of(certificates: Sequence[bytes]) -> list[str]:
    return [name for pem in certificates for name in certificate_names(pem)]


def test_processes_that_listen_beyond_their_node_have_certificates_of_the_launch(tmp_path: Path) -> None:
    scene = Scene(tmp_path, is_local=False)
    specs = scene.ray.specs
    assert names_of([spec.certificate for spec in specs]) == [shard_name(s, r) for s in (0, 1) for r in (0, 1)]
    (authority,) = {spec.authority for spec in specs}
    scene.launcher.repair(scene.launched, {1})
    assert names_of([spec.certificate for spec in specs[4:]]) == [shard_name(1, 0), shard_name(1, 1)]
    handles: tuple[Any, ...] = scene.launched.shards
    assert {spec.authority for spec in specs} == {handle.identity.authority for handle in handles} == {authority}
    other = Scene(tmp_path, is_local=False)
    assert other.ray.specs[0].authority != authority
    for made in (scene, other):
        made.launcher.close()


@pytest.mark.parametrize(("is_local", "settings"), [(True, {}), (False, {"inter_node_tls": False})])
def test_no_certificates_where_nothing_leaves_the_node_or_by_request(
    tmp_path: Path, is_local: bool, settings: dict[str, object]
) -> None:
    scene = Scene(tmp_path, is_local, **settings)
    handles: tuple[Any, ...] = scene.launched.shards
    assert [(spec.certificate, spec.listen_tcp) for spec in scene.ray.specs] == [(b"", not is_local)] * 4
    assert [handle.identity for handle in handles] == [None] * 4
    scene.launcher.close()
