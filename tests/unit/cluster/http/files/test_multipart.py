"""Forms with a file, however they are cut, and what is none."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.http.core import calls
from cluster.http.core.errors import ApiError
from cluster.http.files.multipart import read_form

PART = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
FILE = PART % (b"file", b'; filename="a \xc3\xa9.txt"\r\nContent-Type: text/plain', b"one\r\n--two")
PURPOSE = PART % (b"purpose", b"", b"batch")
END = b"--x--\r\n"


class _Call:
    def waiting(self, action: str) -> Any:
        return nullcontext()


def read(body: bytes, size: int = 1 << 20, kind: str = "multipart/form-data; boundary=x", limit: int = 100) -> Any:
    """(file, name of the file, fields) of a form that comes in pieces of `size`."""
    opened: list[IO[bytes]] = []

    async def stream() -> AsyncIterator[bytes]:
        for at in range(0, len(body), size):
            yield body[at : at + size]

    def open_file() -> IO[bytes]:
        opened.append(tempfile.TemporaryFile())  # noqa: SIM115
        return opened[0]

    async def call(function: Any, *args: Any) -> Any:
        return function(*args)

    async def run() -> Any:
        request: Any = SimpleNamespace(headers={"content-type": kind}, scope={calls._SCOPE_KEY: _Call()}, stream=stream)
        backend: Any = SimpleNamespace(call=call)
        with await read_form(backend, request, open_file, limit) as form:
            return form.file.read(), form.filename, form.fields

    try:
        return asyncio.run(run())
    finally:
        assert all(file.closed for file in opened)


@pytest.mark.parametrize("size", [1, 2, 17, 67, 193])
@pytest.mark.parametrize("body", [FILE + PURPOSE + END, PURPOSE + FILE + END, b"\r\n" + PURPOSE + FILE + b"--x--"])
def test_a_form_however_it_is_cut(body: bytes, size: int) -> None:
    assert read(body, size) == (b"one\r\n--two", "a é.txt", {"purpose": "batch"})


def test_a_form_without_a_file() -> None:
    assert read(PURPOSE + END) == (b"", None, {"purpose": "batch"})


@pytest.mark.parametrize(("body", "status"), [
    (b"", 400), (b"{}", 400), (FILE + PURPOSE, 400), (FILE[:-20], 400), (FILE + FILE + END, 400),
    (PART % (b"purpose", b"", b"x" * 5000) + END, 400), (PURPOSE * 65 + END, 400), (b"--y\r\n", 400),
    (PART % (b"a", b'; b="' + b"c" * 5000 + b'"', b"") + END, 400), (PART % (b"file", b"", b"x" * 101) + END, 413),
    (PART % (b"file", b"", b"x" * (80 << 10)) + END, 413),
])  # fmt: skip
def test_what_is_no_form_is_refused_and_leaves_nothing(body: bytes, status: int) -> None:
    for size in (7, 1 << 20):
        with pytest.raises(ApiError) as caught:
            read(body, size)
        assert caught.value.status == status


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="])
def test_another_type_is_refused(kind: str) -> None:
    with pytest.raises(ApiError, match="must be multipart/form-data"):
        read(FILE + END, kind=kind)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_whatever_comes_is_read_or_refused(noise: bytes, size: int) -> None:
    for body in (noise, FILE + noise + END, PART % (b"file", b"", noise) + END):
        with suppress(ApiError):
            read(body, size, limit=1000)
