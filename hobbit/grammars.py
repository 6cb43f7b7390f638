"""What a grammar or a JSON schema may ask for, before llama.cpp and its converter take it.

They know no limit of their own: a deep one ends the process, and a large number takes all memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from .errors import UsageError

MAX_DEPTH = 4000
MAX_COUNT = 10_000

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def check_depth(grammar: str) -> None:
    """Raise UsageError for a grammar whose brackets are nested deeper than MAX_DEPTH."""
    depth = 0
    for bracket in re.findall(r"[()]", grammar):
        depth += 1 if bracket == "(" else -1
        if depth > MAX_DEPTH:
            raise UsageError(f"the grammar is nested too deeply: at most {MAX_DEPTH} brackets")


def check_counts(schema: str) -> None:
    """Raise UsageError for a JSON schema that wants more than MAX_COUNT of something.

    What is no JSON is left to those who read it.
    """
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError):
        return
    for name, count in _counts(found):
        if count > MAX_COUNT:
            raise UsageError(f"the JSON schema cannot be used: {name}: at most {MAX_COUNT}")


def _counts(schema: Any) -> Iterator[tuple[str, int]]:
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            yield from ((name, value[name]) for name in _COUNTS if _is_count(value.get(name)))
            if isinstance(pattern := value.get("pattern"), str):
                yield "pattern", _repetitions(pattern)


def _is_count(value: object) -> bool:
    return isinstance(value, int | float)


def _repetitions(pattern: str) -> int:
    """Return at most how often it repeats something: quantifiers may be nested."""
    counts = [
        max(int(digits[:9]) for digits in (*found, "1") if digits)
        for found in _QUANTIFIER.findall(pattern)
    ]
    return math.prod(counts)
