"""Which experts of a model earlier runs used, so that a new one can read those first.

After a run that looked expert e up c_e times, its use becomes

    u_e <- u_e * 2^(-1 / HALF_LIFE_RUNS) + c_e

so that a run counts half after HALF_LIFE_RUNS others. There is a file for each model, by its
fingerprint, in the cache folder, and beside it one with the expert maps that the predictor of that
name keeps. Of two processes that end at the same time one may be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .folders import place, recall, remember

HALF_LIFE_RUNS = 4
_VERSION = 1
# What no run comes to.
_MOST_USES = 1e18


def load(fingerprint: str, n_experts: int) -> list[float]:
    """Return the use of each expert, of all groups in order: zeros where nothing is known."""
    found = recall(_name(fingerprint))
    uses = found.get("uses")
    same = (found.get("version"), found.get("model")) == (_VERSION, fingerprint)
    if not (same and isinstance(uses, list) and len(uses) == n_experts):
        return [0.0] * n_experts
    sound = all(isinstance(use, int | float) and 0 <= use < _MOST_USES for use in uses)
    return uses if sound else [0.0] * n_experts


def save(fingerprint: str, counts: Sequence[int]) -> bool:
    """Add a run's look-ups; one that used nothing leaves all as it is. False: nothing written."""
    if not any(counts):
        return False
    decay = 2 ** (-1 / HALF_LIFE_RUNS)
    before = load(fingerprint, len(counts))
    uses = [round(u * decay + c, 3) for u, c in zip(before, counts, strict=True)]
    return remember(_name(fingerprint), {"version": _VERSION, "model": fingerprint, "uses": uses})


def maps_path(fingerprint: str) -> Path | None:
    """Return where the expert maps are kept; None where they cannot be."""
    return place(_name(fingerprint, "maps"))


def order(uses: Sequence[float], everything: bool) -> list[int]:
    """Return the numbers of the experts that were used, the most used first, or all of them.

    A token uses the same number of experts of each layer, so each layer gets its share.
    """
    found = sorted(range(len(uses)), key=lambda expert: -uses[expert])
    return found if everything else [expert for expert in found if uses[expert] > 0]


def _name(fingerprint: str, kind: str = "json") -> str:
    return f"usage/{fingerprint[:32]}.{kind}"
