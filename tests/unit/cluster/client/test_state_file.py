"""The state of a head as its clients read it."""

from __future__ import annotations

from pathlib import Path

import pytest

import cluster
from cluster.client.state_file import DEFAULT_DATA_DIR, read_state
from cluster.config.schema import Config


@pytest.mark.parametrize("text", ["[]", "{", '{"address": "x"}', '{"address": "x", "pid": "y", "started": 1}', "7"])
def test_broken_state_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(cluster.Unavailable, match="longreach up"):
        read_state(tmp_path)


def test_default_data_dir_is_that_of_the_configuration() -> None:
    assert Config.model_fields["data_dir"].default == DEFAULT_DATA_DIR
