"""Which tests run, and in how many processes: structure and units by default, everything with `--all`.

With `--all`, files run in a process a core, four at most (pytest-xdist). Tests of whole heads and of stage processes
watch the time and start processes themselves: one process runs them one after the other, from the beginning. `-n 0`,
`--pdb` or a path run all in one process.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

_FAST = ("tests/unit/", "tests/test_")
_PROCESSES = min(4, len(os.sched_getaffinity(0)))
_ONE_BY_ONE = (
    "tests/faults/", "tests/gpu/", "tests/integration/cli/", "tests/integration/jobs/", "tests/integration/nodes/",
    "tests/integration/stages/",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run identity, integration, GPU and slow tests")


def _is_named(config: pytest.Config) -> bool:
    return config.args_source is not pytest.Config.ArgsSource.TESTPATHS


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute all tests unless the command line says otherwise; pytest-xdist reads these options afterwards."""
    option = config.option
    is_worker = hasattr(config, "workerinput")  # runs what it is told, and starts no other
    if option.all and not is_worker and not _is_named(config) and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist, option.loadscopereorder = "auto", "loadfile", False
        if option.durations is None:
            option.durations, option.durations_min = 30, 5.0  # seconds; what makes the run long is named at its end
        # the processes share the cores, and what they start inherits this
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _PROCESSES)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return _PROCESSES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "one by one" if nodeid.startswith(_ONE_BY_ONE) else super()._split_scope(nodeid)

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # then those that take minutes, so that no process has one of them left at the end
    items.sort(key=lambda item: (not item.nodeid.startswith(_ONE_BY_ONE), item.name != "in_the_interpreter"))
    if config.option.all or _is_named(config):
        return
    fast = [item for item in items if item.nodeid.startswith(_FAST) and item.get_closest_marker("slow") is None]
    kept = {id(item) for item in fast}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = fast


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape in captured output what is no UTF-8: reports go from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
