"""Calls to Ray without Ray: what is asked of it, and what is said of its failures. The real one: tests/integration."""

from __future__ import annotations

import errno
import io
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.common.errors import PlacementError, PreflightError
from cluster.stages.ray_cluster import RayCluster
from protos.node.node_check import NodeError
from tests.unit.cluster.stages.conftest import FakeRay

LEFT = ["shutdown", "environment", "end Ray"]  # what is called when a local Ray is left


def connected(ray: FakeRay) -> RayCluster:
    cluster = RayCluster("local", 0.1)
    cluster.connect()
    return cluster


def test_a_local_ray_is_joined_with_its_secret(ray: FakeRay) -> None:
    cluster = connected(ray)
    assert ray.started["address"] == "127.0.0.1:1234"
    assert ray.started["_temp_dir"] == "/run/ray"
    assert (ray.settings["RAY_AUTH_MODE"], ray.settings["RAY_AUTH_TOKEN"]) == ("token", "secret")
    cluster.close()
    cluster.close()
    assert ray.calls == LEFT


def test_a_ray_that_was_lost_is_told_once_and_replaced(ray: FakeRay) -> None:
    cluster = connected(ray)
    cluster.place(lambda: "actor", 1, 1, 1.0, 0.0)
    told: list[str] = []
    cluster.watch(told.append)
    ray.locals[0].lose("gcs_server ended")
    assert told == ["gcs_server ended"]
    late: list[str] = []
    cluster.watch(late.append)  # whoever asks afterwards learns it too
    assert late == told
    ray.calls.clear()
    cluster.release()
    assert ray.calls == LEFT, "nothing is asked of a Ray that is gone"
    cluster.connect()
    assert len(ray.locals) == 2
    cluster.watch(told.append)
    assert told == late
    ray.calls.clear()
    ray.locals[1].lose("raylet ended")
    cluster.connect()
    assert ray.calls == LEFT
    assert len(ray.locals) == 3


def test_a_wait_for_actors_ends_when_ray_is_lost(ray: FakeRay) -> None:
    cluster = connected(ray)
    ray.error = ray.exceptions.GetTimeoutError()
    ray.locals[0].lose("gcs_server ended")
    with pytest.raises(PlacementError, match=r"^gcs_server ended$"):
        cluster.call([1], 60.0)


def test_the_next_pipeline_uses_the_same_ray(ray: FakeRay) -> None:
    cluster = connected(ray)
    cluster.place(lambda: "actor", 1, 1, 1.0, 0.0)
    cluster.release()
    cluster.release()
    assert ray.calls[-2:] == ["kill actor", "remove group"]
    started, ray.started = ray.started, {}
    cluster.connect()
    assert started
    assert not ray.started
    cluster.place(lambda: "next", 1, 1, 1.0, 0.0)
    cluster.close()
    assert ray.calls[-5:] == ["kill next", "remove group", *LEFT]


def test_a_ray_that_is_gone_is_started_anew(ray: FakeRay) -> None:
    cluster = connected(ray)
    cluster.place(lambda: "actor", 1, 1, 1.0, 0.0)
    ray.error = ray.exceptions.RayError("gone")
    cluster.release()
    assert ray.calls[-4:] == ["kill actor", *LEFT]
    ray.error, ray.started = None, {}
    cluster.connect()
    assert ray.started["address"] == "127.0.0.1:1234"
    cluster.close()
    assert ray.calls[-3:] == LEFT


def test_an_existing_ray_is_joined_as_it_is(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: reached.append(address) or io.BytesIO())
    RayCluster("[::1]:6379").connect()
    assert reached == [("::1", 6379)]
    assert set(ray.started) == {"address", "log_to_driver", "logging_level", "namespace"}
    assert not any("AUTH" in name for name in ray.settings)
    assert ray.locals == []


def test_a_port_that_nobody_holds_fails_at_once(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.ECONNREFUSED, "refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(PlacementError, match=r"^cluster.address: node:6379: Ray cannot be reached: refused$"):
        RayCluster("node:6379").connect()
    assert ray.started == {}


def test_a_failed_start_leaves_nothing(ray: FakeRay) -> None:
    ray.error = RuntimeError("no\n  luck")
    with pytest.raises(PlacementError, match=r"^cluster.address: local: Ray cannot be reached: no luck$"):
        connected(ray)
    assert ray.calls == LEFT
    ray.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        connected(ray)
    ray.is_running = True
    with pytest.raises(PlacementError, match="connected to a Ray cluster already"):
        connected(ray)


def test_signals_wait_until_native_code_is_left(ray: FakeRay) -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def init(**options: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # no other thread may take it, later
        ray.calls.append("start")

    ray.init = init  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            connected(ray)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ray.calls == ["start", *LEFT]


def test_actors_are_placed_by_stage_and_released(ray: FakeRay) -> None:
    cluster = connected(ray)
    names = iter("abcd")

    def actor() -> Any:
        return SimpleNamespace(name=next(names), serve=SimpleNamespace(remote=lambda: "serving"))

    handles = cluster.place(actor, 2, 2, 0.5, 0.0)
    assert [[handle.name for handle in stage] for stage in handles] == [["a", "b"], ["c", "d"]]
    assert ray.calls == [
        "PACK [{'CPU': 1.0}, {'CPU': 1.0}]", "0.5 CPU, 0 GPU, bundle 0", "0.5 CPU, 0 GPU, bundle 1",
    ]  # fmt: skip
    cluster.serve()
    ray.calls.clear()
    cluster.close()
    assert ray.calls[0] == "wait for 4"
    assert [call.startswith("kill") for call in ray.calls[1:5]] == [True] * 4
    assert ray.calls[5:] == ["remove group", *LEFT]


def test_the_actors_of_a_stage_are_replaced_in_their_place(ray: FakeRay) -> None:
    cluster = connected(ray)
    names = iter("abcdef")

    def actor() -> Any:
        name = next(names)
        return SimpleNamespace(name=name, serve=SimpleNamespace(remote=lambda: f"serving {name}"))

    (_, before) = cluster.place(actor, 2, 2, 0.5, 0.0)
    cluster.serve()
    ray.calls.clear()
    after = cluster.replace(actor, 1)
    assert [handle.name for handle in after] == ["e", "f"]
    assert ray.calls == [*(f"kill {handle}" for handle in before), "0.5 CPU, 0 GPU, bundle 1"]
    cluster.serve({1})
    ray.calls.clear()
    cluster.release()
    assert ray.calls[0] == "wait for 4", "nobody waits for those that were killed"
    assert len([call for call in ray.calls if call.startswith("kill")]) == 4
    with pytest.raises(PlacementError, match="no actors are placed"):
        cluster.replace(actor, 1)


def test_actors_cannot_be_replaced_without_ray(ray: FakeRay) -> None:
    cluster = connected(ray)
    cluster.place(lambda: "actor", 2, 1, 1.0, 0.0)
    ray.error = ray.exceptions.RayError("no\n GCS")
    with pytest.raises(PlacementError, match=r"^the actors of stage 0 cannot be replaced: no GCS$"):
        cluster.replace(lambda: "actor", 0)
    assert cluster.lost == ""
    ray.locals[0].lose("gcs_server ended")
    assert cluster.lost == "gcs_server ended"
    with pytest.raises(PlacementError, match=r"^gcs_server ended$"):
        cluster.replace(lambda: "actor", 0)


def test_close_goes_on_when_ray_is_gone(ray: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    cluster = connected(ray)
    cluster.place(object, 1, 1, 1.0, 0.0)
    ray.error = ray.exceptions.RayError("gone")
    cluster.close()
    assert ray.calls[-3:] == LEFT
    assert "Ray was gone" in caplog.text


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ((1, 1, 5.0, 0.0), "1 actors in 1 stages (each on one node) do not fit: 5 CPU needed, 1 of 4 free"),
        (
            (2, 2, 1.5, 0.0),
            "4 actors in 2 stages (each on one node) do not fit: 6 CPU needed, 1 of 4 free",
        ),
        ((1, 1, 1.0, 1.0), "1 CPU needed, 1 of 4 free; 1 GPU needed, 0 of 0 free: lower cluster.cpus_per"),
    ],
)
def test_what_cannot_fit_is_refused_with_numbers(ray: FakeRay, place: tuple[int, int, float, float], said: str) -> None:
    with pytest.raises(PlacementError) as caught:
        connected(ray).place(object, *place)
    assert said in str(caught.value)
    assert not any(call.startswith("PACK") for call in ray.calls)


def test_a_place_that_does_not_come_is_given_up(ray: FakeRay) -> None:
    ray.has_place = False
    with pytest.raises(PlacementError, match="do not fit"):
        connected(ray).place(object, 1, 1, 1.0, 0.0)
    assert ray.calls[-1] == "remove group"


def test_failed_calls_say_what_the_actor_said(ray: FakeRay) -> None:
    cluster = connected(ray)
    assert cluster.call([1, 2], 1.0) == [1, 2]

    def failure(error: Exception) -> str:
        ray.error = error
        with pytest.raises(PlacementError) as caught:
            cluster.call([1], 1.5)
        return str(caught.value)

    def task_error(cause: Exception) -> Exception:
        error: Exception = ray.exceptions.RayTaskError()
        error.cause = cause  # type: ignore[attr-defined]
        return error

    assert failure(ray.exceptions.GetTimeoutError()) == "actors did not answer within 1.5 s"
    assert failure(task_error(NodeError("node a:\n no model"))) == "node a: no model"
    assert failure(task_error(KeyError("x"))) == "an actor failed: KeyError: 'x'"
    assert failure(ray.exceptions.RayError("it\ndied")) == "an actor died: it died"


@pytest.mark.parametrize(
    ("nodes", "stages", "cores"),
    [
        ([4.0], 1, 4),
        ([4.0], 3, 4),
        ([4.0, 8.0], 2, 8),
        ([4.0, 8.0], 1, 4),
        ([4.0, 0.0], 2, 4),
        ([], 2, 1),
        ([0.5], 1, 1),
    ],
)
def test_cores_of_a_pipeline(ray: FakeRay, nodes: list[float], stages: int, cores: int) -> None:
    ray.resources = [{"CPU": cpus} for cpus in nodes]
    assert RayCluster.cores_of_a_pipeline(stages) == cores


def test_folders_of_a_local_ray_are_closed_once_it_has_opened_them(ray: FakeRay) -> None:
    RayCluster("local").connect()
    assert ray.locals[-1].was_connected


def test_a_ray_of_the_operator_that_others_can_use_is_warned_of(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    RayCluster("auto").connect()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["RAY_AUTH_MODE", "cluster.address"]
    caplog.clear()
    tmp_path.chmod(0o700)
    ray.session, ray.is_running = str(tmp_path), False
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    RayCluster("auto").connect()
    assert caplog.records == []


def test_a_token_file_that_others_can_read_is_refused_before_anything_starts(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(PreflightError, match=r"^RAY_AUTH_TOKEN_PATH: .*chmod 600"):
        RayCluster("auto").connect()
    assert ray.started == {}
