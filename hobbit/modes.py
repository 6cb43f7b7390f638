"""The words that `hobbit eval -m` takes, and the rules they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .calibration import BUDGETS, Calibration, load, path_of, rule_for
from .errors import UsageError
from .fingerprint import fingerprint
from .gguf_file import GGUF
from .layout import is_nested
from .low_file import find_low
from .rule import ALL_LOW, EXACT, Rule

HELP = (
    "exact, high, balanced, fast, a KL budget (0.02), T1:T2[:PATIENCE] (0.6:0.9), all-low, "
    "skip-only:T, fewer:K (experts), substitute:LAMBDA (cache-aware routing), or reversed:T1:T2"
)

_SKIP_ONLY, _FEWER, _SUBSTITUTE = "skip-only:", "fewer:", "substitute:"
_REVERSED = "reversed:"


def mode(
    name: str,
    calibration: Calibration | None,
    model: str,
    *,
    deterministic: bool = False,
    roomy: bool = True,
) -> tuple[str, Rule]:
    """Return a mode's name and rule.

    A quality, named or a budget, is the calibration's matter: without one this is a UsageError, and
    `model` is what it says to prepare. `deterministic` is for every rule that is not exact;
    `roomy` is as in calibration.rule_for.
    """
    rule = _rule(name, calibration, model, roomy and not deterministic)
    return name, replace(rule, deterministic=rule.deterministic or deterministic)


def modes(
    names: Sequence[str],
    thresholds: tuple[float | None, float | None],
    calibration: Calibration | None,
    model: str,
    *,
    deterministic: bool = False,
    roomy: bool = True,
) -> list[tuple[str, Rule]]:
    """Return the modes that are asked for, each once, exact first; T1 and T2 add one of their own.

    Of the two thresholds the other is 1 where one is missing.
    """
    asked = ["exact", *names]
    if thresholds != (None, None):
        t1, t2 = (1.0 if t is None else t for t in thresholds)
        # Only T2 given: nothing is low, and what is above it is skipped.
        asked.append(f"{min(t1, t2) if thresholds[0] is None else t1:g}:{t2:g}")
    return [
        mode(
            name,
            calibration,
            model,
            deterministic=deterministic and name != "exact",
            roomy=roomy,
        )
        for name in dict.fromkeys(asked)
    ]


def default_modes(low: Path | None, calibration: Calibration | None) -> list[str]:
    """Return what is compared where no mode is named: all that the model is prepared for."""
    if calibration is not None:
        return [name for name, point in calibration.modes().items() if point is not None]
    return ["all-low"] if low is not None else []


def companions(gguf: GGUF, given: Path | None) -> tuple[Path | None, Calibration | None]:
    """Return a model's low copy, as given or as prepare made it, and the calibration beside it.

    That of a nested model is the model itself.
    Either may be missing. Raises ModelError for a calibration that is damaged or of another model.
    """
    low = given or (gguf.parts[0].path if is_nested(gguf) else find_low(gguf))
    if low is None or not path_of(low).exists():
        return low, None
    return low, load(path_of(low), fingerprint(gguf))


def check_low(asked: Sequence[tuple[str, Rule]], low: Path | None, model: str) -> None:
    """Raise UsageError when a mode needs a low copy and there is none."""
    for name, rule in asked:
        if rule.needs_low and low is None:
            raise UsageError(
                f"{name}: there is no low copy of the experts; run: hobbit prepare {model}"
            )


def _rule(name: str, calibration: Calibration | None, model: str, roomy: bool) -> Rule:
    if name == "exact":
        return EXACT
    if name == "all-low":
        return ALL_LOW
    if name.startswith(_SKIP_ONLY):
        t = _threshold(name.removeprefix(_SKIP_ONLY), name)
        return Rule(t1=t, t2=t)
    if name.startswith(_FEWER):
        count = name.removeprefix(_FEWER)
        if not count.isdecimal() or int(count) < 1:
            raise UsageError(f"{name}: must be a number of experts, 1 or more")
        return Rule(deterministic=True, renormalise=True, experts=int(count))
    if name.startswith(_SUBSTITUTE):
        return Rule(substitute=_threshold(name.removeprefix(_SUBSTITUTE), name))
    if name.startswith(_REVERSED):
        return replace(
            _rule(name.removeprefix(_REVERSED), calibration, model, roomy), reversed=True
        )
    if ":" in name:
        t1, t2, *rest = name.split(":")
        if len(rest) > 1 or (rest and not rest[0].isdecimal()):
            raise UsageError(f"{name}: must be T1:T2 or T1:T2:PATIENCE, as 0.6:0.9:4")
        patience = int(rest[0]) if rest else 0
        return Rule(_threshold(t1, name), _threshold(t2, name), patience=patience)
    if name not in BUDGETS and not re.fullmatch(r"[\d.]+(e-?\d+)?", name):
        raise UsageError(f"unknown mode {name!r}: use {HELP}")
    if calibration is None:
        raise UsageError(f"{name}: the model is not calibrated; run: hobbit prepare {model}")
    return rule_for(calibration, name, roomy=roomy)


def _threshold(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{name}: must be a number from 0 to 1")
    return value
