from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hobbit.calibration import (
    BUDGETS,
    Calibration,
    Point,
    budget_of,
    frontier,
    load,
    path_of,
    rule_for,
    save,
)
from hobbit.errors import HobbitError, ModelError, UsageError
from hobbit.rule import EXACT, Rule
from hobbit.search import MAX_MEASUREMENTS, Histogram, quantiles, search, threshold

RULES = [Rule(t1=t) for t in (0.9, 0.8, 0.7)]


def a_point(rule: Rule, kl: float, size: float, high: float = 0.5, se: float = 0.0) -> Point:
    return Point(rule, kl, kl, se, 5 * kl, size, high, 1 - high, 0.0)


EXACT_POINT = a_point(EXACT, 0, 100, 1.0)
# A convex curve: slopes 0.05, 0.1, 0.2, 0.4 for each pair that is not high.
POINTS = (
    a_point(RULES[0], 0.005, 90, 0.9),
    a_point(RULES[1], 0.015, 80, 0.8),
    a_point(RULES[2], 0.035, 70, 0.7),
)
ALL_LOW = a_point(Rule(t1=-1.0), 0.2, 30, 0.0)
LEVEL = tuple(0.5 + i / 200 for i in range(101))
CALIBRATION = Calibration("abc", "q4_0", "calibration", 900, EXACT_POINT, ALL_LOW, POINTS, LEVEL)


def test_round_trip(tmp_path: Path) -> None:
    path = path_of(tmp_path / "m.low.gguf")
    assert path == tmp_path / "m.low.gguf.calibration.json"
    assert load(path, "abc") is None
    layered = replace(POINTS[0], rule=Rule((0.5, 0.75), (1.0, 1.0), True, True))
    calibration = replace(CALIBRATION, points=(*POINTS, layered))
    save(calibration, path)
    assert load(path, "abc") == calibration
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    data = json.loads(path.read_text())
    assert data["version"] == 1
    assert data["modes"]["fast"]["budget"] == 0.08
    assert data["modes"]["balanced"]["kl"] <= 0.03
    assert set(data["modes"]) == set(BUDGETS)


def test_an_interrupted_write_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.json"
    save(CALIBRATION, path)
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HobbitError, match=r"c\.json: cannot write .* No space") as info:
        save(replace(CALIBRATION, tokens=1), path)
    assert isinstance(info.value.__cause__, OSError)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "of version 2, not 1"),
        (lambda data: data.update(source="other"), "is of another model"),
        (lambda data: data.pop("exact"), "is damaged"),
        (lambda data: data["points"][0].update(kl=-1.0), "is damaged"),
        (lambda data: data["points"][0].update(kl="1"), "is damaged"),
        (lambda data: data["points"][0].pop("kl"), "is damaged"),
        (lambda data: data["points"][0]["rule"].update(t3=1), "is damaged"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    path = tmp_path / "c.json"
    save(CALIBRATION, path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=message):
        load(path, "abc")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_what_is_no_calibration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelError):
        load(path, "abc")


def test_budgets() -> None:
    assert [budget_of(name) for name in ("high", "balanced", "fast")] == [0.01, 0.03, 0.08]
    assert budget_of("0.02") == budget_of(0.02) == 0.02
    for quality in ("fsat", "0", "-1", "nan", "inf", ""):
        with pytest.raises(UsageError, match=r"exact, high, balanced, fast or a KL budget"):
            budget_of(quality)


def test_a_measured_point_is_used_as_it_is() -> None:
    assert rule_for(CALIBRATION, 0.005) == RULES[0]
    assert rule_for(CALIBRATION, 0.2) == rule_for(CALIBRATION, 9.0) == ALL_LOW.rule
    assert rule_for(CALIBRATION, "exact") == EXACT


def test_between_two_points() -> None:
    """Half of the way from 0.015 to 0.035 is half of the way from T1 = 0.8 to 0.7."""
    rule = rule_for(CALIBRATION, 0.025)
    assert isinstance(rule.t1, float) and 0.75 <= rule.t1 <= 0.7511
    assert rule == Rule(t1=rule.t1)
    t1s = [rule_for(CALIBRATION, 0.005 + i * 0.0005).t1 for i in range(61)]
    assert t1s == sorted(t1s, reverse=True)
    assert len({*t1s}) > 50


def test_nothing_between_points_of_a_curve_that_is_not_convex() -> None:
    concave = replace(CALIBRATION, points=(POINTS[0], a_point(RULES[1], 0.02, 80, 0.8), POINTS[2]))
    assert rule_for(concave, 0.019) == RULES[0]
    assert rule_for(concave, 0.03) == RULES[1]
    lonely = replace(CALIBRATION, points=(a_point(Rule(0.9, 0.95), 0.005, 90, 0.9),))
    assert rule_for(lonely, 0.1) == lonely.points[0].rule


def test_the_margin_is_a_standard_error() -> None:
    noisy = replace(CALIBRATION, points=(POINTS[0], replace(POINTS[1], kl_se=0.004)))
    assert rule_for(noisy, 0.0185).t1 > 0.8
    assert rule_for(noisy, 0.0191) == RULES[1]


def test_the_cheapest_wins_not_the_nearest() -> None:
    cheap = a_point(Rule(0.95, 0.95), 0.006, 60, 0.9)
    assert rule_for(replace(CALIBRATION, points=(*POINTS, cheap)), 0.016) == cheap.rule


def test_too_small_a_budget_names_the_smallest() -> None:
    noisy = replace(CALIBRATION, points=(replace(POINTS[0], kl_se=0.00043), *POINTS[1:]))
    with pytest.raises(UsageError, match=r"smallest budget is 0\.0055, or use exact"):
        rule_for(noisy, 0.001)
    assert rule_for(noisy, 0.0055) == RULES[0]
    assert noisy.modes()["high"] is not None
    coarse = replace(CALIBRATION, points=())
    assert coarse.modes() == {"high": None, "balanced": None, "fast": None}


def test_frontier() -> None:
    bad = a_point(Rule(0.5), 0.02, 85)
    assert frontier([POINTS[2], bad, EXACT_POINT, POINTS[0], POINTS[1]]) == [EXACT_POINT, *POINTS]


# --------------------------------------------------------------------------------------------------
# the search


def a_histogram(top: float = 0.5) -> Histogram:
    """Two layers; the scores lie between `top` and 1, more of them near `top`."""
    s = top + (1 - top) * np.random.default_rng(2).beta(1, 2, (2, 20_000))
    return np.array([np.histogram(row, 1000, (0, 1))[0] for row in s])


def share_above(histogram: Histogram, t: float) -> float:
    counts = histogram.sum(axis=0)
    return float(counts[round(t * 1000) :].sum() / counts.sum())


def test_threshold() -> None:
    histogram = a_histogram()
    assert threshold(histogram, 1.0) == 0.0
    assert threshold(histogram, 0.0) <= 1.0
    assert share_above(histogram, threshold(histogram, 0.0)) == 0
    for share in (0.03, 0.3, 0.9):
        t = threshold(histogram, share)
        assert share_above(histogram, t) <= share < share_above(histogram, t - 0.001)
    assert threshold(np.zeros((2, 1000), dtype=np.int64), 0.3) == 0.0


def test_quantiles() -> None:
    found = quantiles(a_histogram())
    assert len(found) == 101 and list(found) == sorted(found)
    assert 0.5 <= found[0] < 0.502 and 0.95 < found[-1] <= 1.0
    for i in (10, 50, 90):
        assert share_above(a_histogram(), found[i]) == pytest.approx(1 - i / 100, abs=0.01)


class Synthetic:
    """Degrading a pair costs in proportion to a power of its weight, 1 - s; skipping costs more."""

    def __init__(self, skip_cost: float, renormalised: float = 1.0, scale: float = 0.12) -> None:
        self.histogram = a_histogram()
        self.skip_cost = skip_cost
        self.renormalised = renormalised
        self.scale = scale
        self.rules: list[Rule] = []

    def __call__(self, rule: Rule) -> Point:
        self.rules.append(rule)
        assert isinstance(rule.t1, float) and isinstance(rule.t2, float)
        assert 0 <= rule.t1 <= rule.t2 <= 1
        counts = self.histogram.sum(axis=0)
        s = (np.arange(1000) + 0.5) / 1000
        skipped, low = s > rule.t2, (s > rule.t1) & (s <= rule.t2)
        weight = counts * (1 - s) ** 2 / (counts * (1 - s) ** 2).sum()
        cost = self.skip_cost * (self.renormalised if rule.renormalise else 1)
        kl = self.scale * (weight[low].sum() + cost * weight[skipped].sum())
        shares = counts[low].sum() / counts.sum(), counts[skipped].sum() / counts.sum()
        size = 1000 - 500 * (0.5 * shares[0] + shares[1])
        high = 1 - sum(shares) / 2
        return Point(rule, kl, kl, 0.01 * kl, 5 * kl, size, high, shares[0] / 2, shares[1] / 2)


@pytest.mark.parametrize(("skip", "renormalised"), [(2.5, 1.0), (5.0, 0.6), (30.0, 2.0)])
@pytest.mark.parametrize("scale", [0.02, 0.12, 1.0])
def test_search(skip: float, renormalised: float, scale: float) -> None:
    budgets = (0.01, 0.03, 0.08)
    measure = Synthetic(skip, renormalised, scale)
    points = search(measure, measure.histogram, budgets)
    assert len(points) == len(measure.rules) == len({*measure.rules}) <= MAX_MEASUREMENTS
    assert points[0].rule == EXACT and points[1].rule == Rule(0.0, 1.0)
    calibration = Calibration(
        "x", "q4_0", "t", 1, points[0], points[1], (*points,), quantiles(measure.histogram)
    )
    grid = [measure(Rule(i / 100, j / 100, False, flag))
            for i in range(101) for j in range(i, 101) for flag in (False, True)]  # fmt: skip
    for budget in budgets:
        found = measure(rule_for(calibration, budget))
        assert found.kl <= budget  # what was promised holds, interpolated or not
        best = min(p.bytes_per_token for p in grid if p.kl <= budget)
        assert 1000 - found.bytes_per_token >= 0.8 * (1000 - best), budget


def test_search_keeps_what_all_rules_share() -> None:
    measure = Synthetic(2.0)
    base = Rule(deterministic=True, per_token=True)
    points = search(measure, measure.histogram, (0.02,), base=base, limit=6)
    assert len(points) <= 6
    assert all(p.rule.deterministic and p.rule.per_token for p in points[1:])


def test_search_where_nothing_is_small_enough() -> None:
    measure = Synthetic(2.0, scale=1e4)
    assert len(search(measure, measure.histogram, (1e-6,))) <= MAX_MEASUREMENTS
