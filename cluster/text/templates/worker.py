"""The program of the process that renders chat templates: a template may loop for ever or want any amount of memory.

`process` starts it as a fresh interpreter and ends it. Standard input is a socket; a message on it, either
way, is a kind of one byte, the length as 8 bytes, then the content as UTF-8. It sends `R` once it is ready, then for
each request (`Q`, a JSON object of `Request`) the text (`T`) or the reason why there is none (`E`; `M`: out of memory,
and the process must be ended). The kernel ends it when it uses too much CPU time, or when the other side is gone while
it renders.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.common.child_limits import limit_resources

_HEADER_BYTES = 9
_REASON_CHARS = 1000
_CHUNK_BYTES = 1 << 20
_SOCKET = 0


class Request(TypedDict):
    """A template, what it is rendered with, what its clock says (ISO 8601), and how much it may write."""

    template: str
    variables: dict[str, Any]
    now: str
    max_chars: int


def main(memory_bytes: int, cpu_seconds: int) -> None:
    """Answer requests until the other side closes the socket."""
    fcntl.fcntl(_SOCKET, fcntl.F_SETOWN, os.getpid())
    limit_resources(memory_bytes, open_files=16)
    _send(b"R", "")
    while (message := _receive()) is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + cpu_seconds, hard))
        status = fcntl.fcntl(_SOCKET, fcntl.F_GETFL)
        fcntl.fcntl(_SOCKET, fcntl.F_SETFL, status | os.O_ASYNC)  # SIGIO ends us when the other side goes
        reply = _answer(message)
        fcntl.fcntl(_SOCKET, fcntl.F_SETFL, status)
        _send(*reply)
        del message, reply


def _answer(message: bytearray) -> tuple[bytes, str]:
    """Return kind and content of the reply to a request."""
    try:
        try:
            return b"T", render(json.loads(message.decode("utf-8", "surrogatepass")))
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            return b"E", _reason(error)
    except MemoryError:
        return b"M", ""


def render(request: Request) -> str:
    """Return the text of a template. Raises whatever the template raises, TemplateRuntimeError if it is too long."""
    now, limit = datetime.fromisoformat(request["now"]), request["max_chars"]
    random.seed(0)  # a template that draws lots gives the same prompt again when its job is resumed
    variables = request["variables"] | {"strftime_now": lambda form: now.strftime(form)}
    pieces, size = [], 0
    for piece in _compile(request["template"]).generate(variables):
        size += len(piece)
        if size > limit:
            raise jinja2.TemplateRuntimeError(f"the output passes {limit} characters")
        pieces.append(piece)
    return "".join(pieces)


class _GenerationTag(Extension):
    """`{% generation %}` marks training targets; for inference its content is plain."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    """Return a template in the environment in which transformers renders chat templates."""
    extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as transformers does: jinja2's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    line = f"in line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return line + (str(error)[:_REASON_CHARS] or type(error).__name__)


def _send(kind: bytes, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    data = memoryview(kind + len(content).to_bytes(_HEADER_BYTES - 1, "big") + content)
    while data:
        data = data[os.write(_SOCKET, data[:_CHUNK_BYTES]) :]


def _receive() -> bytearray | None:
    """Return the content of the next message; None once the other side has closed."""
    header = _read(_HEADER_BYTES)
    return None if header is None else _read(int.from_bytes(header[1:], "big"))


def _read(size: int) -> bytearray | None:
    data = bytearray()
    while len(data) < size:
        if not (chunk := os.read(_SOCKET, min(size - len(data), _CHUNK_BYTES))):
            return None
        data += chunk
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
