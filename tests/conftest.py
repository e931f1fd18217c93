"""Which tests run: structure and units by default; everything with `--all` or where a path is named."""

from __future__ import annotations

import pytest

_FAST = ("tests/unit/", "tests/test_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run identity, integration, GPU and slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if config.getoption("--all") or named:
        return
    fast = [item for item in items if item.nodeid.startswith(_FAST) and item.get_closest_marker("slow") is None]
    kept = {id(item) for item in fast}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = fast
