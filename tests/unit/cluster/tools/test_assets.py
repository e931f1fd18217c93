"""The needle model that ships with the package."""

from __future__ import annotations

from cluster.tools.assets import needle_dir
from tests.support.paths import NEEDLE


def test_the_needle_model_is_found() -> None:
    assert needle_dir() == NEEDLE
    assert (needle_dir() / "words.json").is_file()
