"""Human integers: the decimal / binary rule, exactness, and refusals of one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.common.units import MAX_VALUE, UnitError, format_bytes, format_count, parse_bytes, parse_count

COUNTS = [
    (0, 0),
    (1, 1),
    (4093, 4093),
    ("0", 0),
    ("1_000", 1000),
    ("256k", 256_000),
    ("256K", 262_144),
    ("1m", 1_000_000),
    ("1M", 1_048_576),
    ("1g", 10**9),
    ("1G", 1 << 30),
    (" 7 ", 7),
    ("1.5k", 1500),
    ("0.5K", 512),
    (MAX_VALUE, MAX_VALUE),
    (str(MAX_VALUE), MAX_VALUE),
]

SIZES = [
    (512, 512),
    ("512MiB", 512 << 20),
    ("1GiB", 1 << 30),
    ("1.5GB", 1_500_000_000),
    ("1kB", 1000),
    ("1KB", 1000),
    ("1KiB", 1024),
    ("2TiB", 2 << 40),
    ("1 GiB", 1 << 30),
    ("7B", 7),
    ("1M", 1 << 20),
    ("1m", 10**6),
    ("1_024", 1024),
]

GARBAGE = [
    *("", " ", "k", "-1", "+-1", "1e3", "0x10", "1,000", "1__0", "_1", "1_", "1.", ".5", "1.5", "1kk", "1 0"),
    *("nan", "inf"),
    *("1.0005k", "١", "1k\n2", "9" * 31, "9" * 100_000, "9223372036854775808", "9000000000G", "1\0", "1q", "１"),
    *(-1, 1.0, 0.5, float("nan"), float("inf"), True, False, None, [], {}, b"1", MAX_VALUE + 1, 10**5000, object()),
]


@pytest.mark.parametrize(("text", "expected"), COUNTS)
def test_counts(text: object, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize(("text", "expected"), SIZES)
def test_sizes(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("parse", [parse_count, parse_bytes])
def test_garbage_is_one_line(parse, value: object) -> None:
    with pytest.raises(UnitError) as caught:
        parse(value)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 200
    assert "must be a" in message


def test_byte_units_are_no_counts() -> None:
    for text in ("1KiB", "1MB", "1B"):
        with pytest.raises(UnitError):
            parse_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1K"), (4093, "4093"), (256_000, "256k"), (262_144, "256K"),
     (1_000_000, "1m"), (1 << 20, "1M"), (1_024_000, "1024k"), (1000 << 20, "1000M"), (1000, "1k")],
)  # fmt: skip
def test_format_count(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (1, "1B"), (1023, "1023B"), (1024, "1KiB"), (1536, "1.5KiB"), (512 << 20, "512MiB"), (1 << 30, "1GiB"),
     (1_500_000_000, "1.4GiB"), (100 << 30, "100GiB"), (1 << 50, "1024TiB")],
)  # fmt: skip
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, MAX_VALUE))
def test_counts_come_back(count: int) -> None:
    assert parse_count(format_count(count)) == count


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_one_line(text: str) -> None:
    for parse in (parse_count, parse_bytes):
        message = "-"
        try:
            assert parse(text) >= 0
        except UnitError as error:
            message = str(error)
        assert len(message.splitlines()) == 1
