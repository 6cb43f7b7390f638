"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from .errors import UsageError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?\s*", re.ASCII | re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Read a size: `8G` or `8GiB` is 8 * 2^30 bytes, `8GB` is 8 * 10^9, a bare number is bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size: write it like 8G, 7.5GiB, 8GB or 500M")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    # Whole numbers stay integers: a float would round sizes beyond 2^53.
    value = int(number) if number.isdigit() else float(number)
    return int(value * base ** _POWER[prefix.lower()]) if prefix else int(value)


def format_size(size: int) -> str:
    """Write a size with one decimal in the largest binary unit that leaves at least 1."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        # 1023.95 and more would print as 1024.0 of the smaller unit.
        if abs(value) < 1023.95:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
