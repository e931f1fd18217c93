"""Which tests run: structure and units by default; everything with `--all` or where a path is named.

With `--all`, files run beside each other in as many processes as there are cores, four at most; then, one after the
other in one process, come the tests whose heads and stage processes need the cores. `-n 0` runs all in one process.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

_FAST = ("tests/unit/", "tests/test_")
_ALONE = (
    "tests/faults/", "tests/gpu/", "tests/integration/cli/", "tests/integration/jobs/", "tests/integration/stages/",
)  # fmt: skip
_BESIDE = (
    "tests/integration/client/",
    "tests/integration/http/",
    "tests/integration/server/",
)  # they mostly wait, as those marked do


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run identity, integration, GPU and slow tests")


def _is_named(config: pytest.Config) -> bool:
    return config.args_source is not pytest.Config.ArgsSource.TESTPATHS


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute all tests, unless the command line says otherwise; pytest-xdist reads these options afterwards."""
    option = config.option
    if option.all and not _is_named(config) and getattr(option, "numprocesses", 0) is None:
        option.numprocesses = min(4, len(os.sched_getaffinity(0)))
        option.dist, option.loadscopereorder = "loadgroup", False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if getattr(config.option, "dist", "no") == "loadgroup":
        _group(items)
    if config.option.all or _is_named(config):
        return
    fast = [item for item in items if item.nodeid.startswith(_FAST) and item.get_closest_marker("slow") is None]
    kept = {id(item) for item in fast}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = fast


def _group(items: list[pytest.Item]) -> None:
    """Make each file a group, which one process runs; the last two are what may run beside heads, and these."""

    def last_group(item: pytest.Item) -> str:
        if item.nodeid.startswith(_BESIDE) or item.get_closest_marker("beside") is not None:
            return "1 beside"
        return "2 alone" if item.nodeid.startswith(_ALONE) else ""

    items.sort(key=last_group)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(last_group(item) or item.nodeid.partition("::")[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape in captured output what is no UTF-8: reports go from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
