"""When an expert may have fewer bits: the thresholds on a pair's score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError

Threshold = float | tuple[float, ...]


def _values(threshold: Threshold) -> tuple[float, ...]:
    return threshold if isinstance(threshold, tuple) else (threshold,)


@dataclass(frozen=True)
class Rule:
    """Which precision a (token, expert) pair needs, by its score s.

    s is the sum of the gate weights that are larger than the pair's own, of all the token's gate
    weights scaled to sum 1: 0 for the most important expert (HOBBIT, arXiv 2411.01433, section
    3.2). s <= t1 needs the high precision, s <= t2 the low one, more is skipped. A threshold is one
    number, or one for each group of the layout.

    deterministic: the need decides alone, so that the output does not depend on what is cached;
    without it, a better copy that is cached is used.
    renormalise: after a skip, a token's other gate weights grow to the old sum.
    patience: an expert's high copy is read when it was needed so often; until then a low one is
    used. 0 and 1 are no patience. What it costs is at most what computing everything low costs.
    substitute: lambda of cache-aware routing (arXiv 2412.00099), which the others are compared
    with: experts that are cached get this share of the range of the router's logits on top.
    experts: so many of a token's experts are used and the others skipped; 0 is all.
    reversed: s sums the smaller gate weights instead: the important experts go first, to compare.
    per_token: with deterministic, in a batch too each token gets its own precision; otherwise an
    expert gets the strongest need of the batch.
    """

    t1: Threshold = 1.0
    t2: Threshold = 1.0
    deterministic: bool = False
    renormalise: bool = False
    per_token: bool = False
    patience: int = 0
    substitute: float = 0.0
    experts: int = 0
    reversed: bool = False

    def __post_init__(self) -> None:
        for name, value in (("T1", self.t1), ("T2", self.t2)):
            if not all(math.isfinite(v) for v in _values(value)):
                raise UsageError(f"{name} is {value}: must be a number from 0 to 1")
        if any(low < high for high, low in zip(*self._pairs(), strict=True)):
            raise UsageError(f"T1 is {self.t1} and T2 is {self.t2}: T1 must not be above T2")

    def _pairs(self) -> tuple[Sequence[float], Sequence[float]]:
        t1, t2 = _values(self.t1), _values(self.t2)
        n = max(len(t1), len(t2))
        if {len(t1), len(t2)} - {1, n}:
            raise UsageError(f"T1 has {len(t1)} values and T2 has {len(t2)}")
        return [*t1] * (n // len(t1)), [*t2] * (n // len(t2))

    def thresholds(self, n_groups: int) -> tuple[list[float], list[float]]:
        """Return T1 and T2 of each group; raises UsageError when they are for another model."""
        both = [[*values] * (n_groups if len(values) == 1 else 1) for values in self._pairs()]
        if any(len(values) != n_groups for values in both):
            raise UsageError(f"the thresholds are for {len(both[0])} layers, not for {n_groups}")
        return both[0], both[1]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever lower than high."""
        others = self.substitute or self.experts or self.patience > 1
        return min(_values(self.t1)) >= 1 and not others

    @property
    def needs_low(self) -> bool:
        """Whether a low-precision copy may be asked for."""
        lower = any(high < min(low, 1) for high, low in zip(*self._pairs(), strict=True))
        return lower or self.patience > 1


EXACT = Rule()
# s = 0 is above T1: the most important expert too has no more than the low precision.
ALL_LOW = Rule(-1.0, 1.0, deterministic=True)
