"""Read and write numbers as people do: token counts (`256k`) and sizes in bytes (`512MiB`).

The rule, for counts and bytes alike: a lower-case letter is decimal (`256k` = 256,000, `1m` = 1,000,000) and an
upper-case letter is binary (`256K` = 262,144, `1M` = 1,048,576). With a `B` the unit follows the standards instead:
`kB`, `MB`, `GB`, `TB` are decimal and `KiB`, `MiB`, `GiB`, `TiB` binary. `_` may group digits (`1_000`), a fraction is
allowed when the result is whole (`1.5GB`). Everything else is refused.
"""

from __future__ import annotations

import re
from fractions import Fraction

from protos.errors import UserError

COUNT_RULE = "must be a whole number such as 4096, 1_000, 256k (256000) or 256K (262144)"
BYTES_RULE = "must be a size in bytes such as 1073741824, 512MiB, 1GiB or 1.5GB"
MAX_VALUE = (1 << 63) - 1

_LETTERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BYTE_UNITS = _LETTERS | {"t": 10**12, "T": 1 << 40, "B": 1, "kB": 10**3}
for _power, _prefix in enumerate("KMGT", start=1):
    _BYTE_UNITS |= {f"{_prefix}iB": 1024**_power, f"{_prefix}B": 1000**_power}
# At most 30 digits: more cannot be a size and would only make arithmetic slow.
_NUMBER = re.compile(r"(?=[0-9_.]{1,30}(?![0-9_.]))([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)


class UnitError(UserError):
    """A number that cannot be read; the message is one line, `VALUE: what is allowed`."""


def parse_count(value: object) -> int:
    """Return a count of tokens: of an integer, or of text such as `256k`, `256K`, `1_000`. Else raises UnitError."""
    return _parse(value, _LETTERS, COUNT_RULE)


def parse_bytes(value: object) -> int:
    """Return a size in bytes: of an integer, or of text such as `512MiB`, `1.5GB`, `1G`. Else raises UnitError."""
    return _parse(value, _BYTE_UNITS, BYTES_RULE)


def format_count(count: int) -> str:
    """Return the shortest text that `parse_count` reads back exactly: 256000 -> `256k`, 262144 -> `256K`."""
    exact = [f"{count // _LETTERS[unit]}{unit}" for unit in "mMkK" if count and count % _LETTERS[unit] == 0]
    return min(sorted(exact, key=str.isupper), key=len) if exact else str(count)  # decimal where both are as short


def format_bytes(size: int) -> str:
    """Return a size in the largest binary unit it fills, with up to two decimal places (`1.43GiB`)."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _BYTE_UNITS[unit]:
            return f"{size / _BYTE_UNITS[unit]:.2f}".rstrip("0").rstrip(".") + unit
    return f"{size}B"


def _parse(value: object, units: dict[str, int], rule: str) -> int:
    result: int | Fraction | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        result = value
    elif isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        if match and match[2] in units:
            result = Fraction(match[1].replace("_", "")) * units[match[2]]
    if result is None or not 0 <= result <= MAX_VALUE or result != int(result):
        raise UnitError(f"{_show(value)}: {rule}")
    return int(result)


def _show(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # str() of a huge integer is slow or refused
        return f"an integer of {value.bit_length()} bits"
    return ascii(value)[:60] if isinstance(value, (str, int, float)) or value is None else type(value).__name__
