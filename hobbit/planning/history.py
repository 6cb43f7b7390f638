"""How predictions fared: a few numbers of each run that was long enough, kept per model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Any

from ..cpus import cpu_name
from ..folders import recall, remember, state_folder
from .estimate import EXPONENTS, Range, exponent_of

FILE = "runs.json"
# Of shorter runs the speed says little.
MIN_TOKENS = 32
# A run counts as missed when it is this far from what is likeliest, and outside the range.
MISSED = 0.25
_KEPT_RUNS, _KEPT_MODELS = 12, 200
# How far the next run's exponent may be from those that were seen; of a single run, twice as far.
_SPREAD = 0.2


@dataclass(frozen=True)
class Run:
    """One run: what was predicted and measured, in tokens a second.

    `hit` is the share of a token's expert bytes that was not read, `share` that of the experts
    which had a place; both tell something only of a run in exact precision.
    """

    predicted_low: float
    predicted: float
    predicted_high: float
    measured: float
    share: float
    hit: float
    exact: bool
    date: str = ""

    @property
    def error(self) -> float:
        """How far off the prediction was: 0.1 is a run faster than predicted by a tenth."""
        return self.measured / self.predicted - 1

    @property
    def is_missed(self) -> bool:
        outside = not self.predicted_low <= self.measured <= self.predicted_high
        return outside and abs(self.error) > MISSED


def runs_of(model: str) -> list[Run]:
    """Return the runs of a model (by fingerprint) on this machine, the oldest first."""
    found = recall(FILE, state_folder).get(_key(model))
    runs = []
    for values in found if isinstance(found, list) else []:
        try:
            run = Run(**values)
        except TypeError:
            continue
        speeds = (run.predicted_low, run.predicted, run.predicted_high, run.measured)
        shares = (run.share, run.hit)
        if all(_within(n, 0, math.inf) and n for n in speeds) and all(
            _within(n, 0, 1) for n in shares
        ):
            runs.append(run)
    return runs


def keep(model: str, run: Run) -> bool:
    """Add a run; False where it cannot be written."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    earlier = [asdict(r) for r in runs_of(model)][1 - _KEPT_RUNS :]
    runs = [*earlier, asdict(run) | {"date": date}]
    everything: dict[str, Any] = recall(FILE, state_folder)
    everything.pop(_key(model), None)  # to the end: the models that were not used longest go
    everything = dict([*everything.items()][1 - _KEPT_MODELS :])
    return remember(FILE, everything | {_key(model): runs}, state_folder)


def exponents(runs: Sequence[Run]) -> Range:
    """Return what the hits of these runs come to, or else what models have in general."""
    known = [exponent_of(run.share, run.hit) for run in runs if run.exact]
    found = [value for value in known if value is not None]
    if not found:
        return EXPONENTS
    spread = _SPREAD * (1 + 1 / len(found))
    slow, fast = 1 - spread, 1 + spread
    return Range(min(found) * slow, median(found), max(found) * fast)


def said(runs: Sequence[Run]) -> str:
    """Say in a few words how far off the predictions for these runs were."""
    if not runs:
        return "no run here yet"
    errors = [100 * run.error for run in runs]
    if len(errors) == 1:
        return f"the last run here was {errors[0]:+.0f} %"
    return f"the last {len(errors)} runs here were {min(errors):+.0f} to {max(errors):+.0f} %"


def _within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and least <= value <= most and math.isfinite(value)


def _key(model: str) -> str:
    return f"{cpu_name()} {model[:32]}"
