"""The verb: exit codes, JSON, errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli.checkpoint import plan
from tests.support.planner.models import config_json


def test_json_and_exit_codes(tmp_path: Path):
    path = str(config_json(tmp_path))
    fits = CliRunner().invoke(plan, [path, "--context", "1m", "--gpu", "h200", "--json"])
    assert fits.exit_code == 0
    assert json.loads(fits.stdout)["context"] == 1_000_000
    refused = CliRunner().invoke(plan, [path, "--context", "1m", "--have", "2x24GB"])
    assert refused.exit_code == 1
    assert "does not fit" in refused.stdout


@pytest.mark.parametrize("options", [["--gpu", "nothing"], ["--context", "many"], ["--kv", "int2"], ["--cores", "0"]])
def test_bad_options_are_refused(tmp_path: Path, options: list[str]):
    result = CliRunner().invoke(plan, [str(config_json(tmp_path)), *options])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
