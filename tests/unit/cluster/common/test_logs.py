"""Lines of the log: one a record, whatever is in it."""

from __future__ import annotations

import io
import logging
import re

import pytest

from cluster.common import logs
from cluster.common.logs import LineFormatter, configure_logging, escape_warnings


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(logs._FORMAT))
    logger = logging.getLogger("test_logs")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    return stream


def test_a_record_is_a_line(written: io.StringIO) -> None:
    forged = "name\n2026-01-01 00:00:00,000 ERROR head: forged\x1b[31m\u2028\u202e"
    logging.getLogger("test_logs").warning("label %s", forged)
    (line,) = written.getvalue().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING test_logs: label name\\n2026-", line)
    assert line.isprintable()


def test_tracebacks_are_indented_and_forge_nothing(written: io.StringIO) -> None:
    try:
        raise ValueError("text\nlongreach: error: forged\x1b[2J")
    except ValueError:
        logging.getLogger("test_logs").exception("it broke")
    first, *rest = written.getvalue().splitlines()
    assert first.endswith("ERROR test_logs: it broke")
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert any("test_logs.py" in line for line in rest)


def test_our_records_are_logged_from_info_on(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("cluster").level
    try:
        monkeypatch.setattr(logging.StreamHandler, "emit", lambda *_: None)
        root.handlers.clear()
        configure_logging()
        assert isinstance(root.handlers[0].formatter, LineFormatter)
        assert logging.getLogger("cluster.server").isEnabledFor(logging.INFO)
        assert not logging.getLogger("library").isEnabledFor(logging.INFO)
    finally:
        root.handlers[:], level, ours = before
        root.setLevel(level)
        logging.getLogger("cluster").setLevel(ours)


def test_warnings_without_configuration_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))
    escape_warnings()
    logger = logging.getLogger("test_logs.alone")
    monkeypatch.setattr(logger, "propagate", False)
    logger.warning("a\nb\x1b[2J")
    assert capsys.readouterr().err == "a\\nb\\x1b[2J\n"
