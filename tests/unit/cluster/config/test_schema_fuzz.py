"""Generated YAML files: each loads, or fails in one line that begins with the file and mostly names the place.

2,000 files; `LONGREACH_FUZZ=10000` makes as many, `LONGREACH_FUZZ_SEED` others. A failing file is printed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cluster.bench.faults.yaml_files import generate
from cluster.config.deployment import ConfigError, Deployment, load_config, load_deployment
from tests.unit.cluster.config.test_schema import CONFIGS, write

COUNT = int(os.environ.get("LONGREACH_FUZZ", "2000"))
SEED = os.environ.get("LONGREACH_FUZZ_SEED", "20")


@pytest.mark.slow
def test_generated_files_load_or_fail_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "needle").symlink_to(CONFIGS / "needle")
    outcomes = {"loaded": 0, "deployed": 0, "refused": 0}
    for number in range(COUNT):
        content = generate(SEED, number)
        path = write(tmp_path, content)
        message, reached = "", "refused"
        try:
            load_config(path)
            reached = "loaded"
            assert isinstance(load_deployment(path), Deployment)
            reached = "deployed"
        except ConfigError as error:
            message = str(error)
        except Exception as error:  # noqa: BLE001 - any other is a find, to be shown with its file
            pytest.fail(f"file {number} of seed {SEED}: {type(error).__name__}: {error}\n{content!r}")
        outcomes[reached] += 1
        context = f"file {number} of seed {SEED}: {message!r}\n{content!r}"
        assert len(message.splitlines()) <= 1, context
        assert message.isprintable(), context
        assert not message or re.match(rf"{re.escape(str(path))}:(\d+: )?.", message), context
        assert len(message) < 600 + len(str(path)), context
    assert sum(outcomes.values()) == COUNT
    if COUNT >= 1000:  # all three ways are taken often: the generator does not only make rubbish
        assert min(outcomes.values()) > COUNT // 100, outcomes
