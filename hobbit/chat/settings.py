"""Sampling parameters by the names that ollama and llama.cpp give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from ..generate import Sampling
from ..options import MAX_SEED


def _number(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return parse


def _limit(text: str) -> int | None:
    value = int(text)
    if value == 0 or value < -2:
        raise ValueError
    return None if value < 0 else value


_INF = float("inf")

# The parameter's name -> the field of Sampling, how it is read, what it must be.
PARAMETERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "temperature": ("temperature", _number(float, 0, 1e6), "a number from 0"),
    "top_k": ("top_k", _number(int, 0, 2**31 - 1), "a number of tokens, 0 for all"),
    "top_p": ("top_p", _number(float, 0, 1), "a number from 0 to 1"),
    "min_p": ("min_p", _number(float, 0, 1), "a number from 0 to 1"),
    "repeat_penalty": ("repeat_penalty", _number(float, 0, 1e6), "a number from 0; 1 is none"),
    "seed": ("seed", _number(int, 0, MAX_SEED), f"a number from 0 to {MAX_SEED}"),
    "num_predict": ("max_tokens", _limit, "a number of tokens, or -1 for no limit"),
    "stop": ("stop", lambda text: (text,), "a text"),
}

_LLAMA_CPP = {"temp": "temperature", "predict": "num_predict", "n_predict": "num_predict"}
_AT_START = {"num_ctx": "-c", "ctx_size": "-c", "num_thread": "-t", "threads": "-t"}


def with_parameter(sampling: Sampling, name: str, value: str) -> Sampling:
    """Return the settings with one changed; a stop text is added to those that there are."""
    if name in _AT_START:
        raise UsageError(f"{name} is set when hobbit starts: with {_AT_START[name]}")
    known = PARAMETERS.get(_LLAMA_CPP.get(name, name))
    if known is None:
        raise UsageError(f"there is no parameter {name!r}: use {', '.join(PARAMETERS)}")
    field, parse, wanted = known
    try:
        parsed = parse(value)
    except ValueError as exc:
        raise UsageError(f"{name} is {value!r}: must be {wanted}") from exc
    if not value:
        raise UsageError(f"{name}: must be {wanted}")
    if field == "stop":
        parsed = (*sampling.stop, *parsed)
    return replace(sampling, **{field: parsed})


def parameter_rows(sampling: Sampling) -> list[tuple[str, str]]:
    """Return the settings by ollama's names; those that are not set are left out."""
    rows = []
    for name, (field, _, _) in PARAMETERS.items():
        value = getattr(sampling, field)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                rows.append((name, f"{each}"))
    return rows
