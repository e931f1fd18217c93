"""Bytes to text: which encoding a file has, and which files are none.

UTF-8 and byte-order marks are facts; everything after them is a guess from the bytes alone, the same on every machine.
"""

from __future__ import annotations

import codecs
import re

from protos.errors import InvalidRequest

_LOOKED_AT = 8000  # bytes; as git does to tell binary files
_MARKS = (  # UTF-32 before UTF-16, whose mark it begins with
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_CONTROLS = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]")  # no text has them, whatever its encoding
_WESTERN_SHARE = 0.3  # of bytes outside ASCII; writing with another alphabet has more
_GUESSED_FROM = 16  # such bytes; fewer say nothing
_OTHERS = ["cp1251", "koi8_r", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "cp1253", "cp1255", "cp1256"]
_MIN_UTF16_ZEROS = 0.6  # of the bytes at odd or even places, in a UTF-16 text without a mark


class NotText(InvalidRequest):
    """A file that is binary, or not of the encoding that was named."""


def decode(data: bytes, encoding: str | None = None) -> tuple[str, str]:
    """Return (text, encoding) of the bytes of a file; a byte-order mark is not part of the text.

    Tried in this order: `encoding` when it is given, byte-order marks, UTF-8, UTF-16 without a mark, Latin-1 or
    cp1252 when most bytes are ASCII, else the likeliest of Cyrillic, Greek, Hebrew, Arabic and East Asian encodings.

    Raises:
        NotText: the bytes are no text, or not of this `encoding`.
    """
    if encoding is not None:
        return _decode_as(data, encoding), encoding
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _decode_as(data, name), name
    if b"\0" in data[:_LOOKED_AT]:
        wide = _utf16_name(data)
        if wide is None:
            raise NotText("is binary")
        return _decode_as(data, wide), wide
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    if _CONTROLS.search(data[:_LOOKED_AT]):
        raise NotText("is binary")
    name = _guess(data)
    return data.decode(name), name


def is_binary(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is no text; True is certain, False is not."""
    if head.startswith(b"%PDF-"):
        return True
    marked = any(head.startswith(mark) for mark, _ in _MARKS)
    return not marked and b"\0" in head[:_LOOKED_AT] and _utf16_name(head[:_LOOKED_AT]) is None


def _decode_as(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise NotText(f"encoding: {encoding!r}: must be one that Python knows, such as latin-1") from error
    except UnicodeError as error:
        at = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise NotText(f"is not {encoding}{at}") from error


def _utf16_name(data: bytes) -> str | None:
    """Return the UTF-16 variant of a text without a mark, by where the zero bytes of its ASCII characters are."""
    if len(data) % 2:
        return None
    even, odd = data[:_LOOKED_AT:2], data[1:_LOOKED_AT:2]
    few = len(even) * (1 - 0.95)
    for name, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if zeros.count(0) >= _MIN_UTF16_ZEROS * len(zeros) and others.count(0) <= few:
            try:
                text = data[:_LOOKED_AT].decode(name, "ignore")
            except UnicodeError:
                return None
            return name if not _CONTROLS.search(text.encode("utf-8", "replace")) else None
    return None


def _guess(data: bytes) -> str:
    """Return an encoding of one or two bytes a character in which `data` can be decoded."""
    sample = data.translate(None, bytes(range(128)))
    if len(sample) > max(_GUESSED_FROM, _WESTERN_SHARE * len(data)):
        from charset_normalizer import from_bytes  # here: most texts never need it

        for match in from_bytes(data, cp_isolation=_OTHERS, enable_fallback=False):
            return str(match.encoding)
    if not any(0x80 <= byte <= 0x9F for byte in set(sample)):
        return "latin-1"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"
