"""What is refused, and what is warned of, about a Ray of the operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.common.errors import PreflightError
from cluster.stages.joined_ray import check_token_file, is_open, weak_points

TOKEN = {"RAY_AUTH_MODE": "token"}


def write(path: Path, mode: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("secret")
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_private_token_is_accepted(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "token", mode)
    check_token_file(TOKEN | {"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666, 0o602])
def test_a_token_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "token", mode)
    with pytest.raises(PreflightError, match=rf"^RAY_AUTH_TOKEN_PATH: {path}: mode {mode:o}: .*chmod 600 {path}$"):
        check_token_file(TOKEN | {"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path)


def test_that_of_the_home_directory_counts_where_no_other_is_named(tmp_path: Path) -> None:
    check_token_file(TOKEN, tmp_path)
    path = write(tmp_path / ".ray" / "auth_token", 0o644)
    with pytest.raises(PreflightError, match=rf"^Ray's token: {path}: mode 644"):
        check_token_file(TOKEN, tmp_path)
    check_token_file({}, tmp_path)
    check_token_file(TOKEN | {"RAY_AUTH_TOKEN": "secret"}, tmp_path)


def test_a_token_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be read"):
        check_token_file(TOKEN | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, tmp_path)


def test_a_folder_is_closed_by_any_of_those_around_it(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "session"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        folder.chmod(0o755)
        assert is_open(folder) == all(each.stat().st_mode & 1 for each in folder.parents)
    assert is_open(Path("/"))
    inner.parent.chmod(0o700)
    inner.chmod(0o777)
    assert not is_open(inner)
    assert not is_open(tmp_path / "none")


def test_what_is_warned_of(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert weak_points(TOKEN, private) == []
    (line,) = weak_points({}, private)
    assert line.startswith("RAY_AUTH_MODE: not set: ")
    (line,) = weak_points(TOKEN, Path("/"))
    assert line.startswith("cluster.address: others can enter /, ")
    assert len(weak_points({"RAY_AUTH_MODE": "disabled"}, Path("/"))) == 2
