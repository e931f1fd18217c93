"""What `up` says before it starts a head; the rest is in tests/integration/cli/test_head.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import head
from cluster.cli.main import main
from cluster.common.errors import PlacementError
from tests.support.data.certificates import Authority
from tests.support.fakes.jobs_api import write_secret


def started(*_: object) -> None:
    raise PlacementError("the head would start now")


@pytest.mark.parametrize(("hours", "warned"), [(-1.0, "expired on"), (24 * 9.0, "expires on"), (24 * 99.0, "")])
def test_dates_of_the_certificate_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, warned: str
) -> None:
    monkeypatch.setattr(head, "_spawn", started)
    certificate, key = Authority(tmp_path, "authority").issue("head", hours=hours)
    config = write_secret(
        tmp_path / "head.yaml",
        f"model: {{path: m}}\ndata_dir: {tmp_path / 'data'}\nserver: {{port: 7777}}\n"
        f"security: {{tls_cert_file: {certificate}, tls_key_file: {key}}}\n",
    )
    done = CliRunner().invoke(main, ["up", str(config)])
    *warnings, last = done.stderr.splitlines()
    assert last == "longreach: error: the head would start now"
    assert len(warnings) == bool(warned)
    for line in warnings:
        assert line.startswith(f"longreach: warning: security.tls_cert_file: {certificate}: {warned}")
