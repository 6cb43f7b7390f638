"""What each rule costs on one model and its low copy: measured points, kept beside the low file.

A quality is a budget in mean KL divergence to exact (nats a token); a named mode is a name for one.
Its rule is the cheapest measured one, in bytes read a token, whose KL with one standard error added
stays within the budget. Between two measured rules it may be interpolated: see `_between`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import HobbitError, ModelError, UsageError
from .rule import EXACT, Rule

VERSION = 1
SUFFIX = ".calibration.json"
# The budgets that the named modes stand for: mean KL to exact, in nats a token.
BUDGETS = {"high": 0.01, "balanced": 0.03, "fast": 0.08}
# Standard errors that are added to a measured KL before it is compared with a budget.
MARGIN = 1.0


@dataclass(frozen=True)
class Point:
    """One measured rule. KL in nats; bytes read a token; shares of the (token, expert) pairs.

    `kl` and the bytes are with half of the experts cached; `kl_any` is what no cache exceeds; the
    shares are what pairs need.
    """

    rule: Rule
    kl: float
    kl_any: float
    kl_se: float
    kl_p99: float
    bytes_per_token: float
    high: float
    low: float
    skipped: float

    @property
    def bound(self) -> float:
        """The KL that a budget has to allow for, with half of the experts cached or more."""
        return self.kl + MARGIN * self.kl_se

    @property
    def bound_any(self) -> float:
        """The KL that a budget has to allow for, whatever is cached."""
        return self.kl_any + MARGIN * self.kl_se


@dataclass(frozen=True)
class Calibration:
    """What is known of a model with one low copy.

    `source` is the fingerprint of the model; `text` names the text and `tokens` says how many of it
    counted; `exact` and `all_low` are the two ends; `points` all that was measured between them;
    `quantiles` are s at 0, 1 .. 100 % of the pairs but the top ones.
    """

    source: str
    low_type: str
    text: str
    tokens: int
    exact: Point
    all_low: Point
    points: tuple[Point, ...]
    quantiles: tuple[float, ...]

    def modes(self) -> dict[str, Point | None]:
        """Return the point of each named mode; None where every measured one exceeds it."""
        return {name: _best(self, budget, roomy=True) for name, budget in BUDGETS.items()}


def path_of(low: Path) -> Path:
    """Return where the calibration of a low file is."""
    return low.with_name(low.name + SUFFIX)


def save(calibration: Calibration, path: Path) -> None:
    """Write it as JSON, whole or not at all; what the named modes come to is told besides."""
    modes = {
        name: None if point is None else {"budget": BUDGETS[name], **asdict(point)}
        for name, point in calibration.modes().items()
    }
    data = {"version": VERSION, **asdict(calibration), "modes": modes}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise HobbitError(f"{path}: cannot write the calibration: {exc.strerror}") from exc


def load(path: Path, source: str | None = None) -> Calibration | None:
    """Return the calibration of the model whose fingerprint is `source`, or None without a file.

    Without a fingerprint it may be of any model. Raises ModelError for one of another model or
    version, or that is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not JSON"
        raise ModelError(f"{path}: cannot read the calibration: {reason}") from exc
    again = "make it again with hobbit prepare"
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ModelError(f"{path}: a calibration of version {version}, not {VERSION}: {again}")
    try:
        known = {field.name: data[field.name] for field in fields(Calibration)}
        known |= {name: _point(known[name]) for name in ("exact", "all_low")}
        known["points"] = tuple(_point(point) for point in known["points"])
        known["quantiles"] = tuple(float(s) for s in known["quantiles"])
        calibration = Calibration(**known)
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"{path}: the calibration is damaged: {again}") from exc
    if source is not None and calibration.source != source:
        raise ModelError(f"{path}: the calibration is of another model: {again}")
    return calibration


def _point(data: dict[str, Any]) -> Point:
    rule: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in data["rule"].items()
    }
    point = Point(**{**data, "rule": Rule(**rule)})
    numbers = [getattr(point, field.name) for field in fields(Point) if field.name != "rule"]
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError("a point has a number that cannot be")
    return point


def budget_of(quality: str | float) -> float:
    """Return the KL budget that a mode's name or a number means; raise UsageError for neither."""
    if isinstance(quality, str) and quality in BUDGETS:
        return BUDGETS[quality]
    try:
        budget = float(quality)
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        names = ", ".join(("exact", *BUDGETS))
        raise UsageError(f"{quality}: a quality is {names} or a KL budget above 0, as 0.02")
    return budget


def rule_for(calibration: Calibration, quality: str | float, *, roomy: bool = True) -> Rule:
    """Return the cheapest rule within a budget; "exact" is the exact rule.

    `roomy`: half of the experts are cached, or more, and cached copies are used as they are;
    otherwise the rule has to keep the budget whatever is cached.
    Raises UsageError, with the smallest budget that can be met, for less than was measured: exact
    would keep the promise, but not give what was asked for, fewer bytes.
    """
    if quality == "exact":
        return EXACT
    point = _best(calibration, budget_of(quality), roomy)
    if point is None:
        least = min(p.bound if roomy else p.bound_any for p in _lossy(calibration))
        raise UsageError(
            f"a KL of {budget_of(quality):g} is below what this low copy was measured at: "
            f"the smallest budget is {_rounded_up(least):g}, or use exact"
        )
    return point.rule


def frontier(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats in KL and bytes both, by rising KL."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kl, p.bytes_per_token)):
        if not kept or point.bytes_per_token < kept[-1].bytes_per_token:
            kept.append(point)
    return kept


def _lossy(calibration: Calibration) -> list[Point]:
    """Return what a budget may choose from: never exact, which is no lossy mode."""
    return [p for p in (*calibration.points, calibration.all_low) if not p.rule.is_exact]


def _best(calibration: Calibration, budget: float, roomy: bool) -> Point | None:
    within = [p for p in _lossy(calibration) if (p.bound if roomy else p.bound_any) <= budget]
    if not roomy:
        # Patience is for copies that are cached already: what decides alone has none.
        within = [p for p in within if p.rule.patience <= 1]
    else:
        within += _between(calibration, budget)
    return min(within, key=lambda p: (p.bytes_per_token, p.kl), default=None)


def _between(calibration: Calibration, budget: float) -> list[Point]:
    """Interpolate T1 between neighbours of one T2 that lie on both sides of the budget, where safe.

    Let x be the share of pairs that T1 denies the high copy. A smaller T1 degrades more important
    experts, so KL rises ever faster with x: the chord between two measured points lies above the
    curve, and what it says of a rule between them is no less than its KL. That the curve is so is
    not believed but looked for: the slopes before, between and after the two must not fall. With
    fewer than two slopes to compare, nothing is interpolated; and never towards exact, below what
    was measured.
    """
    curves: dict[Rule, list[Point]] = {}
    for point in _lossy(calibration):
        if not isinstance(point.rule.t1, tuple) and point.rule.t1 >= 0:
            curves.setdefault(replace(point.rule, t1=0.0), []).append(point)
    found = []
    for rule, curve in curves.items():
        curve.sort(key=lambda p: -_number(p.rule.t1))
        # Without skips the curve is known to begin at exact.
        known = [calibration.exact, *curve] if rule.t2 == 1.0 else curve
        slopes = [_slope(a, b) for a, b in pairwise(known)]
        for i in range(len(known) - len(curve), len(slopes)):
            a, b, near = known[i], known[i + 1], slopes[max(i - 1, 0) : i + 2]
            convex = len(near) > 1 and all(s <= t for s, t in pairwise(near))
            if convex and a.bound <= budget < b.bound and b.bytes_per_token < a.bytes_per_token:
                part = (budget - a.bound) / (b.bound - a.bound)
                found.append(_mixed(a, b, part, calibration.quantiles))
    return found


def _number(threshold: float | tuple[float, ...]) -> float:
    assert not isinstance(threshold, tuple)
    return threshold


def _slope(a: Point, b: Point) -> float:
    """KL for each further share of pairs that is not high."""
    share = a.high - b.high
    return (b.kl - a.kl) / share if share > 0 else math.inf


def _mixed(a: Point, b: Point, part: float, quantiles: Sequence[float]) -> Point:
    """Return the point at `part` of the way from a to b in the share of pairs, with its T1."""
    shares = [_share_below(quantiles, _number(point.rule.t1)) for point in (a, b)]
    t1 = _quantile(quantiles, shares[0] + part * (shares[1] - shares[0]))
    values = {
        field.name: (1 - part) * getattr(a, field.name) + part * getattr(b, field.name)
        for field in fields(Point)
        if field.name != "rule"
    }
    # Rounded up, to the scorer's resolution: more high than meant, never less.
    t1 = min(math.ceil(t1 * 1000 - 1e-9) / 1000, _number(a.rule.t1))
    return Point(rule=replace(a.rule, t1=t1), **values)


def _share_below(quantiles: Sequence[float], s: float) -> float:
    """Return the share of pairs with a score of at most s: the inverse of `_quantile`."""
    if s >= quantiles[-1]:
        return 1.0
    steps = len(quantiles) - 1
    for i in range(steps):
        a, b = quantiles[i], quantiles[i + 1]
        if s < b:
            return (i + max(s - a, 0.0) / (b - a)) / steps
    return 1.0


def _quantile(quantiles: Sequence[float], share: float) -> float:
    at = min(max(share, 0.0), 1.0) * (len(quantiles) - 1)
    i = min(int(at), len(quantiles) - 2)
    return quantiles[i] + (at - i) * (quantiles[i + 1] - quantiles[i])


def _rounded_up(value: float) -> float:
    """Return it with two digits, no smaller than it is: typed back, it works."""
    if value <= 0:
        return 1e-6
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")
