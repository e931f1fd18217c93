"""The owner of Ray as its user sees it, with a script in its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.common.errors import PlacementError
from cluster.stages import local_ray
from cluster.stages.local_ray import LocalRay, environment
from tests.support.rigs.head import until

ADDRESS = """print('{"address": "127.0.0.1:5"}', flush=True)\n"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[LocalRay, list[str]]]:
    """Start an owner that runs this Python; returns it, and the losses it tells."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setattr(local_ray, "__file__", str(tmp_path / "local_ray.py"))

    def run(script: str) -> tuple[LocalRay, list[str]]:
        (tmp_path / "ray_owner.py").write_text("import os, sys, time\n" + script)
        lost: list[str] = []
        return LocalRay(lost.append), lost

    return run


def group_of(ray: LocalRay) -> list[int]:
    """Return what runs of the owner's process group."""
    return [
        process.pid for process in psutil.process_iter(["status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and _group(process.pid) == ray._owner.pid
    ]  # fmt: skip


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def is_clean() -> bool:
    return not os.listdir(tempfile.gettempdir())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("""print('{"error": "no luck"}')""", "Ray did not start: no luck"),
        ("import nothing_like_it", "did not start: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("sys.exit(3)", "did not start: its process ended without a word"),
        ("time.sleep(60)", "did not start within 0.5 s"),
    ],
)
def test_an_owner_that_cannot_start_ray(
    start: Callable[[str], tuple[LocalRay, list[str]]], monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(local_ray, "_CLOSE_TIMEOUT_S", 0.1)
    ray, lost = start(script)
    with pytest.raises(PlacementError, match=f"^cluster.address: local: .*{reason}"):
        ray.address(0.5 if "within" in reason else 30.0)
    ray.close()
    ray.close()
    assert lost == []
    assert is_clean()


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("""print('{"lost": "the raylet ended"}')""", "the raylet ended"),
        ("os._exit(1)", "the process that owns Ray has ended"),
    ],
)
def test_a_loss_is_told_once(start: Callable[[str], tuple[LocalRay, list[str]]], end: str, told: str) -> None:
    ray, lost = start(ADDRESS + end)
    assert ray.address(30.0) == "127.0.0.1:5"
    until(lambda: lost, "a loss", 30.0)
    ray.close()
    assert lost == [told]
    assert is_clean()


def test_what_a_killed_owner_leaves_is_ended_at_once(start: Callable[[str], tuple[LocalRay, list[str]]]) -> None:
    ray, lost = start("if not os.fork(): os.close(1), time.sleep(60)\n" + ADDRESS + "os.kill(os.getpid(), 9)")
    assert ray.address(30.0)
    until(lambda: lost, "a loss", 30.0)
    until(lambda: not group_of(ray), "nothing of its group runs", 10.0)
    ray.close()
    assert is_clean()


def test_closing_ends_the_owner_and_is_no_loss(start: Callable[[str], tuple[LocalRay, list[str]]]) -> None:
    ray, lost = start(ADDRESS + "sys.stdin.read()")
    assert ray.address(30.0)
    ray.close()
    assert lost == []
    assert is_clean()


def test_an_owner_that_does_not_end_is_killed_with_its_group(
    start: Callable[[str], tuple[LocalRay, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ray, "_CLOSE_TIMEOUT_S", 0.2)
    ray, _ = start("if not os.fork(): time.sleep(60)\n" + ADDRESS + "time.sleep(60)")
    assert ray.address(30.0)
    owner = psutil.Process(ray._owner.pid)
    group = [owner, *owner.children(recursive=True)]
    assert len(group) == 2
    ray.close()
    _, alive = psutil.wait_procs(group, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert is_clean()


def test_the_owner_gets_a_secret_and_nothing_of_other_clusters(
    start: Callable[[str], tuple[LocalRay, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/some/file")
    said = "import json\nprint(json.dumps({'error': json.dumps(dict(os.environ))}))"
    seen = []
    for _ in range(2):
        ray, _ = start(said)
        with pytest.raises(PlacementError, match="did not start") as caught:
            ray.address(30.0)
        assert ray.token in str(caught.value)
        assert "elsewhere" not in str(caught.value)
        assert "/some/file" not in str(caught.value)
        seen.append(ray.token)
        ray.close()
    assert seen[0] != seen[1]
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SETTING", "old")
    monkeypatch.delenv("ANOTHER", raising=False)
    with environment({"A_SETTING": "new", "ANOTHER": "x"}):
        assert (os.environ["A_SETTING"], os.environ["ANOTHER"]) == ("new", "x")
    assert os.environ["A_SETTING"] == "old"
    assert "ANOTHER" not in os.environ
