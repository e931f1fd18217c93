"""Damage requests in every way that a client, a proxy or an attacker might."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.bench.http.recorded import Recorded

_NESTED = "\x00nested\x00"  # a text that becomes deep nesting, which `json.dumps` cannot write
_DEPTHS = (100, 2_000, 100_000)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**63,
    -(2**63) - 1, 10**40, "", "x", "\x00", "\ud800", "\udfff a", "\u202e", "NaN", "-1", "auto", "required", "function",
    "message", "text", [], [[]], ["x"], [None], {}, {"": ""}, {"type": "x"}, {"type": "function"},
    {"role": "user", "content": "a"}, {"$ref": "#"}, {"type": "object", "patternProperties": {"(": {}}},
    "file-" + "0" * 32, "x" * 70_000, [1] * 5_000, _NESTED,
)  # fmt: skip
_TYPES = (
    "", "text/plain", "application/xml", "multipart/form-data", "multipart/form-data; boundary=",
    "application/json; charset=utf-16", "application/x-www-form-urlencoded", "*/*", "json", "application/json;;;=",
)  # fmt: skip


@dataclass(frozen=True)
class Damaged:
    """A request as bytes.

    Attributes:
        kind: what was done to it.
        is_http: whether its head and its framing are well formed, so that it must have an answer.
    """

    kind: str
    path: str
    raw: bytes
    is_http: bool = True


@dataclass(frozen=True)
class _Request:
    path: str
    body: bytes
    content_type: str

    def framed(self, kind: str) -> Damaged:
        return self.sent(kind, [f"Content-Length: {len(self.body)}"], self.body)

    def sent(self, kind: str, headers: list[str], body: bytes, is_http: bool = True) -> Damaged:
        lines = [f"POST {self.path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
        if self.content_type:
            lines.append(f"Content-Type: {self.content_type}")
        return Damaged(kind, self.path, "\r\n".join([*lines, "", ""]).encode() + body, is_http)


def damage(noise: random.Random, recorded: Recorded) -> Damaged:
    """Return a request that was damaged, now and then not at all."""
    is_json = not isinstance(recorded.body, bytes)
    body = json.dumps(recorded.body).encode() if is_json else recorded.body
    request = _Request(recorded.path, body, recorded.content_type)
    if is_json and noise.random() < 0.6:
        kind, text = noise.choice(_OF_JSON)(noise, recorded.body)
        return replace(request, body=text).framed(kind)
    return noise.choice(_OF_BYTES)(noise, request)


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return all places inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*where, key), *places(item, (*where, key)))]


def _write(noise: random.Random, value: Any) -> bytes:
    depth = noise.choice(_DEPTHS)
    text = json.dumps(value, ensure_ascii=noise.random() < 0.9)  # lone surrogates: escaped, or as invalid UTF-8
    opened, closed = noise.choice((("[", "]"), ('{"a":', "}")))
    inner = "1" if opened != "[" else ""
    nested = opened * depth + inner + closed * noise.choice((0, depth, depth))
    for escaped in (json.dumps(_NESTED), _NESTED):
        text = text.replace(escaped, nested)
    return text.encode(errors="surrogatepass")


def _structure(noise: random.Random, body: Any) -> tuple[str, bytes]:
    """Delete, replace, repeat, move or rename parts."""
    changed = copy.deepcopy(body)
    for _ in range(noise.randint(1, 3)):
        found = places(changed)
        if not found:
            break
        *path, last = noise.choice(found)
        inside: Any = changed
        for key in path:
            inside = inside[key]
        match noise.randrange(6):
            case 0:
                del inside[last]
            case 1 if isinstance(inside, list):
                inside.extend(copy.deepcopy(inside) * noise.randint(1, 20))
            case 1:
                inside[last + "_"] = inside.pop(last)
            case 2:
                *other, end = noise.choice(found)
                value: Any = body
                for key in (*other, end):
                    value = value[key] if _has(value, key) else None
                inside[last] = copy.deepcopy(value)
            case _:
                inside[last] = copy.deepcopy(noise.choice(_VALUES))
    return "structure", _write(noise, changed)


def _has(value: Any, key: Any) -> bool:
    return key in value if isinstance(value, dict) else isinstance(value, list) and key < len(value)


def _whole(noise: random.Random, body: Any) -> tuple[str, bytes]:
    """Another value than an object."""
    return "another value", _write(noise, noise.choice(_VALUES))


def _duplicate(noise: random.Random, body: Any) -> tuple[str, bytes]:
    """A key twice, with different values."""
    if not body:
        return "duplicate key", b'{"a": 1, "a": 2}'
    name = noise.choice(list(body))
    first = _write(noise, {name: noise.choice(_VALUES)})[:-1]
    return "duplicate key", first + b", " + json.dumps(body).encode()[1:]


def _truncated(noise: random.Random, body: Any) -> tuple[str, bytes]:
    text = json.dumps(body).encode()
    return "truncated", text[: noise.randrange(len(text))]


def _bad_bytes(noise: random.Random, body: Any) -> tuple[str, bytes]:
    """Bytes that are no UTF-8, or no JSON, anywhere."""
    text = bytearray(json.dumps(body).encode())
    for _ in range(noise.randint(1, 4)):
        text.insert(noise.randrange(len(text) + 1), noise.choice((0, 10, 34, 92, 0x80, 0xC0, 0xED, 0xFF)))
    return "bad bytes", bytes(text)


def _content_type(noise: random.Random, request: _Request) -> Damaged:
    return replace(request, content_type=noise.choice(_TYPES)).framed("content type")


def _noise(noise: random.Random, request: _Request) -> Damaged:
    data = bytearray(request.body or b"x")
    for _ in range(noise.randint(1, 8)):
        data[noise.randrange(len(data))] = noise.randrange(256)
    if noise.random() < 0.3:
        del data[noise.randrange(len(data)) :]
    return replace(request, body=bytes(data)).framed("flipped bytes")


def _chunked(noise: random.Random, request: _Request) -> Damaged:
    """In chunks, well formed or not."""
    body, chunks = request.body, b""
    while body:
        size = noise.randint(1, max(1, len(body)))
        chunks += f"{size:x}\r\n".encode() + body[:size] + b"\r\n"
        body = body[size:]
    chunks += b"0\r\n\r\n"
    is_broken = noise.random() < 0.4
    if is_broken:
        at = noise.randrange(len(chunks))
        broken = (chunks[:at], b"zz\r\n" + chunks, b"f" * 30 + b"\r\n" + chunks, b"-1\r\n" + chunks)
        chunks = noise.choice(broken)
    return request.sent("chunked", ["Transfer-Encoding: chunked"], chunks, not is_broken)


def _length(noise: random.Random, request: _Request) -> Damaged:
    """A length that is not that of the body, or that is none."""
    size = len(request.body)
    wrong: tuple[list[str], ...] = (
        [f"Content-Length: {size + noise.randint(1, 1000)}"], [f"Content-Length: {noise.randrange(size + 1)}"],
        ["Content-Length: -1"], ["Content-Length: x"], [f"Content-Length: {10**noise.randint(10, 30)}"],
        [f"Content-Length: {size}", f"Content-Length: {size + 1}"], [],
        [f"Content-Length: {size}", "Transfer-Encoding: chunked"], ["Transfer-Encoding: gzip"],
    )  # fmt: skip
    return request.sent("length", noise.choice(wrong), request.body, is_http=False)


_OF_JSON: tuple[Callable[[random.Random, Any], tuple[str, bytes]], ...] = (
    _structure, _structure, _structure, _structure, _whole, _duplicate, _truncated, _bad_bytes,
)  # fmt: skip
_OF_BYTES: tuple[Callable[[random.Random, _Request], Damaged], ...] = (_content_type, _noise, _chunked, _length)
