"""Which rules are worth measuring: few, since each takes seconds to minutes.

Let L(x) be the KL when the share x of the pairs that are not on top, those with the largest s, is
computed low, and S(y) the KL when the share y is skipped. A rule that computes the share x - y low
and skips y is taken to cost about

    KL(x, y) = L(x) - L(y) + S(y)       bytes(x, y) likewise

since the damage of different experts adds up. L and S are measured at a few shares and joined by
straight lines; the combination that saves most within a budget is then measured, never believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .calibration import Point
from .rule import EXACT, Rule

MAX_MEASUREMENTS = 14

# Shares at which skipping is priced; HOBBIT's own is 3 % of all pairs.
_SKIP_SHARES = (0.06, 0.2)
# The part of a budget that a prediction aims at, and what is left of it after one that missed.
_AIM = 0.95
_STEP_BACK = 0.95
_GRID = 50
# Shares closer than this are not both worth a measurement.
_NEAR = 0.03

Histogram = npt.NDArray[np.int64]
Measure = Callable[[Rule], Point]


def threshold(histogram: Histogram, share: float) -> float:
    """Return the T that at most `share` of the pairs that are not on top exceed.

    `histogram` counts s in 1000 bins, one row a layer group: T is the edge of a bin.
    """
    counts = np.atleast_2d(histogram).sum(axis=0)
    total = int(counts.sum())
    if not total or share >= 1:
        return 0.0
    # above[k]: pairs in bins k and up, which exceed T = k / bins.
    above = np.append(np.cumsum(counts[::-1])[::-1], 0)
    return int(np.argmax(above <= share * total)) / len(counts)


def quantiles(histogram: Histogram) -> tuple[float, ...]:
    """Return s at 0, 1 .. 100 % of the pairs that are not on top."""
    counts = np.atleast_2d(histogram).sum(axis=0).astype(np.float64)
    bins = len(counts)
    if not counts.sum():
        return tuple(i / 100 for i in range(101))
    below = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1]) + 1
    edges = np.arange(first, last + 1) / bins
    found = np.interp(np.linspace(0, 1, 101), below[first : last + 1], edges)
    return tuple(round(float(s), 6) for s in found)


class _Curve:
    """KL and bytes by share, through measured points, beginning at exact."""

    def __init__(self, exact: Point) -> None:
        self._points = {0.0: exact}

    def add(self, share: float, point: Point) -> None:
        self._points[share] = point

    def _of(self, name: str, share: float) -> float:
        shares = sorted(self._points)
        values = [getattr(self._points[x], name) for x in shares]
        if share > shares[-1] and len(shares) > 1:  # as steep as it ended
            slope = (values[-1] - values[-2]) / (shares[-1] - shares[-2])
            return float(values[-1] + slope * (share - shares[-1]))
        return float(np.interp(share, shares, values))

    def kl(self, share: float) -> float:
        return self._of("kl", share)

    def bytes(self, share: float) -> float:
        return self._of("bytes_per_token", share)

    def largest_within(self, budget: float) -> float:
        """Return the largest share whose KL, with its error, is within the budget by the curve."""
        shares = sorted(self._points)
        at = 0.0
        for a, b in pairwise(shares):
            low, high = self._points[a].bound, self._points[b].bound
            if high <= budget:
                at = b
                continue
            return a + (b - a) * max(budget - low, 0.0) / (high - low)
        return at

    def shares(self) -> list[float]:
        return sorted(self._points)


class _Search:
    def __init__(self, measure: Measure, histogram: Histogram, limit: int, base: Rule) -> None:
        self._measure = measure
        self._histogram = histogram
        self._limit = limit
        self._base = base
        self.points: dict[Rule, Point] = {}

    @property
    def left(self) -> int:
        return self._limit - len(self.points)

    def measured(self, rule: Rule) -> Point:
        if rule not in self.points:
            self.points[rule] = self._measure(rule)
        return self.points[rule]

    def rule(self, x: float, y: float, renormalise: bool = False) -> Rule:
        t1, t2 = threshold(self._histogram, x), threshold(self._histogram, y) if y > 0 else 1.0
        return replace(self._base, t1=min(t1, t2), t2=t2, renormalise=renormalise and y > 0)


def search(
    measure: Measure,
    histogram: Histogram,
    budgets: Sequence[float],
    *,
    base: Rule = EXACT,
    limit: int = MAX_MEASUREMENTS,
) -> list[Point]:
    """Measure at most `limit` rules, exact among them, that matter for these KL budgets.

    `base` has what all rules share, as `deterministic`. The first point is exact's; the second
    computes every expert but the top one low. The rest is in the order of measuring.
    """
    run = _Search(measure, histogram, limit, base)
    low = _Curve(run.measured(EXACT))
    low.add(1.0, run.measured(run.rule(1.0, 0.0)))
    low.add(0.5, run.measured(run.rule(0.5, 0.0)))
    # Downwards: what a larger budget measures narrows the place of the next. By convexity the
    # chord's share is within the budget, and by regula falsi a little below the largest one.
    for budget in sorted(budgets, reverse=True):
        share = low.largest_within(budget)
        near = min(abs(share - known) for known in low.shares())
        if run.left > 2 and near > _NEAR:
            low.add(share, run.measured(run.rule(share, 0.0)))
    skip, renormalise = _skips(run, low)
    _combine(run, low, skip, budgets, renormalise)
    return [*run.points.values()]


def _combine(
    run: _Search, low: _Curve, skip: _Curve, budgets: Sequence[float], renormalise: bool
) -> None:
    """Measure the best predicted rule of each budget in turn, learning from each, to the limit."""
    pending = sorted(budgets, reverse=True)
    caution = dict.fromkeys(pending, _AIM)
    while pending:
        for budget in [*pending]:
            found = _cheapest(low, skip, caution[budget] * budget)
            rule = run.rule(*found, renormalise)
            if run.left <= 0 or found == (0.0, 0.0) or rule in run.points:
                pending.remove(budget)
                continue
            point = run.measured(rule)
            _learn(low, skip, *found, point)
            if point.bound > budget:
                caution[budget] *= _STEP_BACK


def _learn(low: _Curve, skip: _Curve, x: float, y: float, point: Point) -> None:
    """Let the curves agree with a measured combination: what low copies do not explain is y's."""
    if y == 0:
        low.add(x, point)
        return
    kl = max(point.kl - low.kl(x) + low.kl(y), 0.0)
    size = point.bytes_per_token - low.bytes(x) + low.bytes(y)
    skip.add(y, replace(point, kl=kl, bytes_per_token=size))


def _skips(run: _Search, low: _Curve) -> tuple[_Curve, bool]:
    """Price skipping, without and with renormalising, and say which of the two is better."""
    curves = {flag: _Curve(run.points[EXACT]) for flag in (False, True)}
    first = _SKIP_SHARES[0]
    for flag, curve in curves.items():
        if run.left > 0:
            curve.add(first, run.measured(run.rule(first, first, flag)))
    better = len(curves[True].shares()) > 1 and curves[True].kl(first) < curves[False].kl(first)
    for share in _SKIP_SHARES[1:]:
        # Not what is hopeless at its beginning already.
        if run.left > 1 and curves[better].kl(first) <= low.kl(1.0):
            curves[better].add(share, run.measured(run.rule(share, share, better)))
    return curves[better], better


def _cheapest(low: _Curve, skip: _Curve, budget: float) -> tuple[float, float]:
    """Return the shares x and y that by prediction read least within the budget."""
    best, least = (0.0, 0.0), low.bytes(0.0)
    for x, y in _grid(skip.shares()[-1]):
        kl = low.kl(x) - low.kl(y) + skip.kl(y)
        size = low.bytes(x) - low.bytes(y) + skip.bytes(y)
        if kl <= budget and size < least:
            best, least = (x, y), size
    return best


def _grid(most: float) -> Iterator[tuple[float, float]]:
    """Yield pairs of shares: y skipped out of x that are not high, y not far beyond `most`.

    They are closer where they are small: a small budget lives there.
    """
    shares = [(i / _GRID) ** 2 for i in range(_GRID + 1)]
    for i, x in enumerate(shares):
        for y in shares[: i + 1]:
            if y <= 2 * most:
                yield x, y
