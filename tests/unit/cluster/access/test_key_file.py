"""The keys file as it is changed: every line that is not meant stays, and no change is lost or half done."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.access import key_file
from cluster.access.key_file import KeyFile
from cluster.access.keys import load_api_keys
from cluster.common.errors import PreflightError
from cluster.jobs.tenants.tenant import Tenant
from protos.errors import UserError
from tests.support.fakes.jobs_api import write_secret

PLAIN = "# the operators\n\nops:0123456789abcdef admin\nlaw:0123456789abcdef2"


def test_other_lines_stay_as_they_are(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "keys", PLAIN)
    file = KeyFile(path)
    first, second = file.create(Tenant("new")), file.create(Tenant("new"))
    assert path.read_text().startswith(f"{PLAIN}\nnew:sha256=")
    keys = load_api_keys(path)
    assert [keys.tenant(key) for key in (first, second, "0123456789abcdef2")] == [
        Tenant("new"), Tenant("new"), Tenant("law"),
    ]  # fmt: skip
    ids = [line.id for line in file.list() if line.tenant.name == "new"]
    assert file.revoke("new", ids[0]) == 1
    assert load_api_keys(path).tenant(second) == Tenant("new")
    assert file.revoke("new") == 1
    assert file.revoke("law") == 1
    assert path.read_text() == "# the operators\n\nops:0123456789abcdef admin\n"


def test_another_key_of_a_name_has_its_limits(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys")
    file.create(Tenant("law", max_streams=2))
    with pytest.raises(UserError, match="law: has a key with other limits"):
        file.create(Tenant("law"))
    assert len(file.list()) == 1


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write_secret(tmp_path / "keys", PLAIN))
    KeyFile(tmp_path / "link").create(Tenant("new"))
    assert (tmp_path / "link").is_symlink()
    assert len(load_api_keys(tmp_path / "keys")) == 3


def test_changes_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: KeyFile(path).create(Tenant(f"n{number}")), range(24)))
    keys = load_api_keys(path)
    assert [keys.tenant(key) for key in made] == [Tenant(f"n{number}") for number in range(24)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_secret(tmp_path / "keys", PLAIN)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(key_file.os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        KeyFile(path).create(Tenant("new"))
    assert path.read_text() == PLAIN
    assert {one.name for one in tmp_path.iterdir()} == {"keys", "keys.lock"}


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="must not be open to others"):
        KeyFile(write_secret(tmp_path / "open", PLAIN, 0o644)).create(Tenant("new"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        KeyFile(tmp_path / "file" / "keys").create(Tenant("new"))
    if os.geteuid():
        (tmp_path / "folder").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be written"):
            KeyFile(tmp_path / "folder" / "keys").create(Tenant("new"))
