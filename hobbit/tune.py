"""Settings of a cache policy that fit a routing trace: those that read the fewest bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import UsageError
from .policy import Policy

_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)

# What each policy heeds, and the values that are tried of it.
SETTINGS: dict[str, dict[str, Sequence[float]]] = {
    "decay": {
        "half_life": (8, 16, 32, 64, 128, 256, 512, 1024),
        "w_fld": (0.0, 0.1, 0.2, 0.4, 0.8, 1.6),
    },
    "hobbit": dict.fromkeys(("w_lru", "w_lfu", "w_lhu", "w_fld"), _WEIGHTS),
}


def tune(policy: Policy, cost: Callable[[Policy], float]) -> tuple[Policy, float]:
    """Return the cheapest settings and their cost: one setting after the other, until none helps.

    Each step takes the best value of the grid for one setting, the others as they are; so the cost
    never rises, and the result is one that no single change of the grid improves. A policy without
    settings is returned as it is.
    """
    costs: dict[Policy, float] = {}

    def known(tried: Policy) -> float:
        if tried not in costs:
            costs[tried] = cost(tried)
        return costs[tried]

    best, before = policy, None
    while best != before:
        before = best
        for name, values in SETTINGS.get(policy.name, {}).items():
            tried = [best, *(_with(best, {name: value}) for value in values)]
            best = min(tried, key=known)  # of equals the first: what it was
    return best, known(best)


def sweep(policies: Sequence[Policy], grid: Mapping[str, Sequence[float]]) -> list[Policy]:
    """Return each policy with every combination of the grid's settings, of those that it heeds.

    Raises UsageError where no policy heeds a setting.
    """
    for name in grid:
        if not any(name in SETTINGS.get(policy.name, {}) for policy in policies):
            heeding = [policy for policy, settings in SETTINGS.items() if name in settings]
            raise UsageError(
                f"--sweep {name}: none of the policies heeds it"
                + (f"; it is a setting of {' and '.join(heeding)}" if heeding else "")
            )
    swept = []
    for policy in policies:
        heeded = {n: v for n, v in grid.items() if n in SETTINGS.get(policy.name, {})}
        for values in itertools.product(*heeded.values()):
            swept.append(_with(policy, dict(zip(heeded, values, strict=True))))
    return swept


def _with(policy: Policy, settings: dict[str, Any]) -> Policy:
    return replace(policy, **settings)
