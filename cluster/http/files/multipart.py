"""Read a form with one file (`multipart/form-data`): the file goes to disk as it comes, fields stay small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from cluster.http.core.backend import Backend
from cluster.http.core.body import pieces
from cluster.http.core.errors import ApiError, refuse

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM_BYTES = 64 << 10  # of a form beside its file
_MAX_PARTS = 64
_MAX_FIELD_BYTES = 4096
_MAX_HEADER_BYTES = 4096  # of all headers of a part


@dataclass(slots=True)
class Form:
    """A form: texts of its fields, and its file with the name that the client has for it."""

    file: IO[bytes]
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None  # None: no file came

    def __enter__(self) -> Form:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


async def read_form(
    backend: Backend, request: Request, open_file: Callable[[], IO[bytes]], max_bytes: int,
    check_room: Callable[[int], None] = lambda size: None,
) -> Form:  # fmt: skip
    """Return the form of a request, whose part `file` is the file; it is closed with the form.

    Args:
        open_file: makes an empty file.
        max_bytes: of the file.
        check_room: told how many bytes of the file there are so far; may raise.

    Raises:
        ApiError: it is no form, too large, comes too slowly, or was cut off. Nothing is left behind then.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(400, "request: must be multipart/form-data with a boundary")
    form = Form(await backend.call(open_file))
    try:
        reader = _Reader(form, max_bytes, check_room)
        parser = MultipartParser(boundary, reader.callbacks())
        async for piece in pieces(request, max_bytes + FORM_BYTES):
            await backend.call(parser.write, piece)
        if not reader.is_complete:
            raise ApiError(400, "request: the form has no end")
        form.file.seek(0)
    except FormParserError as error:
        form.file.close()
        raise ApiError(400, f"request: no valid form: {error}") from error
    except BaseException:
        form.file.close()
        raise
    return form


class _Reader:
    """Takes in what the parser finds; `is_complete` at the end of the form."""

    def __init__(self, form: Form, max_bytes: int, check_room: Callable[[int], None]) -> None:
        self._form = form
        self._max_bytes = self._left = max_bytes
        self._check_room = check_room
        self._num_parts = 0
        self._begin()
        self.is_complete = False

    def _begin(self) -> None:
        self._name = ""  # of the part
        self._is_file = False
        self._text = bytearray()  # of a field
        self._header_name, self._header_value = bytearray(), bytearray()
        self._header_bytes = 0

    def callbacks(self) -> MultipartCallbacks:
        """Return the functions that the parser calls."""
        return {
            "on_part_begin": self._part_begin, "on_header_field": self._header_field,
            "on_header_value": self._header_text, "on_header_end": self._header_end, "on_part_data": self._data,
            "on_part_end": self._part_end, "on_end": self._end,
        }  # fmt: skip

    def _part_begin(self) -> None:
        self._begin()
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise ApiError(400, f"request: must have at most {_MAX_PARTS} parts")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise ApiError(400, f"request: headers of a part must have at most {_MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._name = options.get(b"name", b"").decode(errors="replace")
            self._is_file = self._name == "file"
            if self._is_file and self._form.filename is not None:
                raise refuse("file", "a second one: a form has one")
            if self._is_file:
                self._form.filename = options.get(b"filename", b"").decode(errors="replace")
        self._header_name, self._header_value = bytearray(), bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._left -= end - start
            if self._left < 0:
                raise ApiError(413, "file: too large (server.max_document_bytes)", code="request_too_large")
            self._check_room(self._max_bytes - self._left)
            self._form.file.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise refuse(self._name or "request", f"must have at most {_MAX_FIELD_BYTES} bytes")

    def _part_end(self) -> None:
        if not self._is_file and self._name:
            self._form.fields[self._name] = self._text.decode(errors="replace")

    def _end(self) -> None:
        self.is_complete = True
