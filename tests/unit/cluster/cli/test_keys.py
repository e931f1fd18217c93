"""`longreach keys`: what it prints, and what is in the file."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.access.keys import load_api_keys
from cluster.cli.main import main
from cluster.jobs.tenants.tenant import Tenant


def invoke(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments, "--file", str(path)])


def test_a_key_is_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys"
    law = invoke(path, "create", "law", "--streams", "2", "--queued-jobs", "9", "--document-bytes", "1.5GB")
    root = invoke(path, "create", "root", "--admin")
    assert (law.exit_code, root.exit_code) == (0, 0)
    key = law.stdout.strip()
    assert law.stderr == f"a key of law, in {path}; clients take it from LONGREACH_API_KEY\n"
    assert key not in path.read_text()
    assert load_api_keys(path).tenant(key) == Tenant("law", False, 2, 9, 1_500_000_000)
    assert load_api_keys(path).tenant(root.stdout.strip()) == Tenant("root", is_admin=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = json.loads(invoke(path, "list", "--json").stdout)["keys"]
    assert [(line["name"], line["max_streams"], line["is_admin"]) for line in shown] == [
        ("law", 2, False), ("root", None, True),
    ]  # fmt: skip
    table = invoke(path, "list").stdout
    assert "law" in table
    assert "1.4GiB" in table
    assert invoke(path, "revoke", "law").stdout == "revoked 1 key of law\n"
    assert load_api_keys(path).tenant(key) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "a:b"), "name: 'a:b': must be 1 to 64 letters"),
        (("create", "law", "--streams", "0"), "0 is not in the range"),
        (("create", "law", "--document-bytes", "much"), "must be a size in bytes"),
        (("revoke", "law"), "name: 'law': has no key in"),
    ],
)
def test_bad_input_changes_nothing(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = invoke(tmp_path / "keys", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "keys").exists()


def test_an_empty_list(tmp_path: Path) -> None:
    assert invoke(tmp_path / "keys", "list").stdout == f"no key in {tmp_path / 'keys'}\n"
