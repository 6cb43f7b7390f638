from __future__ import annotations

import pytest

from hobbit.errors import UsageError
from hobbit.sizes import format_size, parse_size

GOOD = [
    ("8G", 8 << 30),
    ("8GiB", 8 << 30),
    ("8gib", 8 << 30),
    ("8GB", 8 * 10**9),
    ("500M", 500 << 20),
    ("500MB", 500 * 10**6),
    ("1.5G", 3 << 29),
    (" 2 T ", 2 << 40),
    ("64k", 64 << 10),
    ("123456", 123456),
    ("123456B", 123456),
    ("0", 0),
    ("9007199254740993", 9007199254740993),
]
BAD = ["", "G", "-1G", "8X", "8GiBs", "8G4", "1e9", "nan", "8,5G", "50%", "auto", "٨G"]


@pytest.mark.parametrize(("text", "size"), GOOD)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", BAD)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (8 << 30, "8.0 GiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 999, 4096, 123456789, 7 << 33])
def test_round_trip(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.06)
