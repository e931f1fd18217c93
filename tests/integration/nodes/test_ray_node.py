"""configs/deploy/ray-node.sh: what it refuses, in one line and before Ray starts, and how it starts Ray."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.nodes.ray_nodes import SCRIPT

FAKE_RAY = (
    '#!/bin/sh\nprintf "%s\\n" "$@" "$RAY_AUTH_MODE" "${RAY_AUTH_TOKEN-none}" "$RAY_AUTH_TOKEN_PATH" "$(umask)"\n'
)


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    ray = programs / "ray"
    ray.write_text(FAKE_RAY)
    ray.chmod(0o755)
    settings = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder), "RAY_FOLDER": str(folder / "ray"),
        "RAY_AUTH_TOKEN": "of another Ray",
    }  # fmt: skip
    settings.pop("RAY_AUTH_TOKEN_PATH", None)
    return subprocess.run(
        [str(SCRIPT), *arguments], env=settings | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / ".longreach-ray-token"
    path.write_text("secret")
    path.chmod(0o600)
    return path


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert done.stdout == "", "Ray was not started"
    (line,) = done.stderr.splitlines()
    assert line.startswith("ray-node.sh: ")
    return line


def test_the_first_machine_makes_a_secret_that_others_cannot_read(tmp_path: Path) -> None:
    done = run(tmp_path, "head", "10.0.0.1", "--num-cpus=4")
    assert done.returncode == 0, done.stderr
    *arguments, mode, token, path, umask = done.stdout.splitlines()
    assert arguments[:3] == ["start", "--block", "--disable-usage-stats"]
    assert {"--head", "--node-ip-address=10.0.0.1", "--num-cpus=4", f"--temp-dir={tmp_path}/ray/ray"} <= {*arguments}
    assert (mode, token, umask) == ("token", "none", "0077")
    assert Path(path) == tmp_path / ".longreach-ray-token"
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(Path(path).read_text())) == 32
    assert (tmp_path / "ray").stat().st_mode & 0o777 == 0o700
    first = Path(path).read_text()
    assert run(tmp_path, "head", "10.0.0.1").returncode == 0
    assert Path(path).read_text() == first, "a machine that starts again has the same one"


def test_others_join_with_the_same_secret(tmp_path: Path, token: Path) -> None:
    done = run(tmp_path, "join", "10.0.0.1:6379", "10.0.0.2", "--num-cpus=4")
    assert done.returncode == 0, done.stderr
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2"} <= {*done.stdout.splitlines()}
    assert "--head" not in done.stdout
    assert token.read_text() == "secret"


def test_joining_without_the_secret_is_refused(tmp_path: Path) -> None:
    line = refused(run(tmp_path, "join", "10.0.0.1:6379", "10.0.0.2"))
    assert "RAY_AUTH_TOKEN_PATH" in line
    assert "copy it from the first machine" in line


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_secret_that_others_can_read_or_write_is_refused(tmp_path: Path, token: Path, mode: int) -> None:
    token.chmod(mode)
    assert f"chmod 600 {token}" in refused(run(tmp_path, "head", "10.0.0.1"))


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, token: Path, mode: int) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    folder.chmod(mode)
    assert f"chmod 700 {folder}" in refused(run(tmp_path, "head", "10.0.0.1"))


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, token: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "ray").symlink_to(tmp_path / "elsewhere")
    assert "RAY_FOLDER" in refused(run(tmp_path, "head", "10.0.0.1"))


@pytest.mark.parametrize("arguments", [(), ("head",), ("join", "10.0.0.1:6379"), ("leave", "10.0.0.1")])
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused(run(tmp_path, *arguments))
