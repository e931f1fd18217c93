"""The configurations and the needle model that ship with the package."""

from __future__ import annotations

from cluster.tools.assets import configs_dir, needle_dir
from tests.support.paths import CONFIGS, NEEDLE


def test_assets_are_found() -> None:
    assert (needle_dir(), configs_dir()) == (NEEDLE, CONFIGS)
    assert (configs_dir() / "needle" / "words.json").is_file()
