"""The configurations that ship with the package."""

from __future__ import annotations

from cluster.config.configs_dir import configs_dir
from tests.support.paths import CONFIGS


def test_the_folder_of_this_checkout() -> None:
    assert configs_dir() == CONFIGS
