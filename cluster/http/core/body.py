"""Read the body of a request within bounds, and parse it into the model of its protocol."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from cluster.http.core.backend import Backend
from cluster.http.core.calls import call_of
from cluster.http.core.errors import ApiError
from protos.jobs.limits import MAX_REQUEST_BYTES, MAX_TOKEN_IDS
from protos.jobs.validate import show

_MAX_ALL_BYTES = 512 << 20  # of all bodies that are being read or parsed
_SLOW_S, _SLOW_RATE = 60.0, 1024  # from this time on a body must have come with so many bytes a second
_BIG_BYTES = 64 << 10
_MAX_PARTS = 1 << 16  # objects, lists and texts of a big body: each costs much more memory than it has bytes
# One that has no end goes to the end of the body: else it would be tried again from every quotation mark in it.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_VARIANT = re.compile(r"(str|bool|int|literal|list)(\[|$)")  # how pydantic names the variants of a union
_Model = TypeVar("_Model", bound=BaseModel)


class _Memory:
    """Bytes of bodies that are in memory."""

    size = 0

    @contextmanager
    def holding(self) -> Iterator[list[int]]:
        """Count what the block adds to its list as held until it ends."""
        sizes: list[int] = []
        try:
            yield sizes
        finally:
            self.size -= sum(sizes)


_memory = _Memory()


async def read_model(
    backend: Backend, request: Request, model: type[_Model], max_bytes: int = MAX_REQUEST_BYTES
) -> _Model:
    """Return the body of a request as an object of `model`. Raises ApiError."""
    with _memory.holding() as held:
        body = await _read(request, max_bytes, held)
        if len(body) > _BIG_BYTES:
            return await backend.call(parse, model, body)
    return parse(model, body)


async def _read(request: Request, max_bytes: int, held: list[int]) -> bytes:
    """Return the whole body; what is declared too long is refused before it is read."""
    body = bytearray()
    async for piece in pieces(request, max_bytes):
        body += piece
        held.append(len(piece))
        _memory.size += len(piece)
        if _memory.size > _MAX_ALL_BYTES:
            raise ApiError(429, "requests: too many bytes at a time: try again", code="busy", retry_after_s=2.0)
    return bytes(body)


async def pieces(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body of a request as it comes; what is declared too long is refused before it is read.

    Raises ApiError: it is too long, and as `arriving`.
    """
    declared = request.headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,15}", declared) or int(declared) > max_bytes:
        raise _too_large(declared, max_bytes)
    size = 0
    async for piece in arriving(request):
        size += len(piece)
        if size > max_bytes:
            raise _too_large(str(size), max_bytes)
        yield piece


async def arriving(request: Request) -> AsyncIterator[bytes]:
    """Yield the body of a request as it comes. Raises ApiError: it is cut off, or trickles in."""
    call, began, size = call_of(request), time.monotonic(), 0
    stream = request.stream().__aiter__()
    while True:
        try:
            with call.waiting("send"):
                piece = await anext(stream, None)
        except ClientDisconnect as error:
            raise ApiError(400, "request: cut off") from error
        if piece is None:
            return
        size += len(piece)
        waited = time.monotonic() - began
        if waited > _SLOW_S and size < waited * _SLOW_RATE:
            problem = f"request: {size} bytes in {waited:.0f} s: must be {_SLOW_RATE} a second"
            raise ApiError(408, problem, code="not_sent")
        yield piece


def _too_large(size: str, max_bytes: int) -> ApiError:
    return ApiError(413, f"request: {show(size)} bytes: must be at most {max_bytes}", code="request_too_large")


def parse(model: type[_Model], body: bytes) -> _Model:
    """Return a JSON text as an object of `model`. Raises ApiError naming the first field that is wrong."""
    if len(body) > _BIG_BYTES:
        _check_parts(body)
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise _first_problem(error) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "request: must be a JSON object") from error


def _check_parts(body: bytes) -> None:
    """Refuse what would become too many objects, before any is made; numbers of a list of token ids are none."""
    parts = end = numbers = 0
    for number, match in enumerate(_STRING.finditer(body)):
        parts += body.count(b"{", end, match.start()) + body.count(b"[", end, match.start()) + 1
        numbers += body.count(b",", end, match.start())
        end = match.end()
        if number > _MAX_PARTS:
            break
    parts += body.count(b"{", end) + body.count(b"[", end)
    numbers += body.count(b",", end)
    if parts > _MAX_PARTS or numbers > MAX_TOKEN_IDS + _MAX_PARTS:
        raise ApiError(400, f"request: must have at most {_MAX_PARTS} objects, lists and texts")


def _first_problem(error: ValidationError) -> ApiError:
    detail: Any = error.errors(include_url=False, include_context=False)[0]
    if detail["type"] == "json_invalid":
        return ApiError(400, f"request: not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}")
    param = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not (param and _VARIANT.match(str(part))):
            param += f".{part}" if param else str(part)
    if not param:
        return ApiError(400, "request: must be a JSON object")
    if detail["type"] == "missing":
        return ApiError(400, f"{param}: (missing): {detail['msg']}", param=param)
    return ApiError(400, f"{param}: {show(detail['input'])}: {detail['msg']}", param=param)
