"""Logs: a line a record on stderr, which nothing from outside can forge or break."""

from __future__ import annotations

import logging

from cluster.common.text_format import escape_unprintable

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LineFormatter(logging.Formatter):
    """Formats a record as one line, unprintable characters as escapes; a traceback follows in indented lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_unprintable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return _indented(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:
        return _indented(stack_info)


def _indented(text: str) -> str:
    return "\n".join(f"    {escape_unprintable(line)}" for line in text.split("\n"))


def configure_logging() -> None:
    """Log to stderr, for a head: this program's records from INFO on, those of libraries from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("cluster").setLevel(logging.INFO)


def escape_warnings() -> None:
    """Have what is logged without any configuration, warnings on stderr, as lines of their own too."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LineFormatter())
