from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from hobbit.errors import UsageError
from hobbit.rule import ALL_LOW, EXACT, Rule


def test_the_two_ends() -> None:
    assert EXACT == Rule() == Rule(1.0, 1.0)
    assert EXACT.is_exact and not EXACT.needs_low
    assert ALL_LOW.needs_low and not ALL_LOW.is_exact
    # 0 is the score of each token's best expert, and exceeds T1 too.
    assert ALL_LOW.thresholds(2) == ([-1.0, -1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("rule", "is_exact", "needs_low"),
    [
        (Rule(1.0, 1.0, deterministic=True), True, False),
        (Rule(1.0, 1.0, renormalise=True), True, False),
        (Rule(1.0, 1.0, patience=1), True, False),
        (Rule(2.0, 3.0), True, False),
        (Rule(0.5, 0.5), False, False),  # skips, and computes nothing low
        (Rule(0.5, 1.0), False, True),
        (Rule(0.5, 0.9), False, True),
        (Rule(0.0, 0.0), False, False),
        (Rule((1.0, 0.5), 1.0), False, True),
        (Rule((1.0, 0.5), (1.0, 0.5)), False, False),
        (Rule((1.0, 1.0), (1.0, 1.0)), True, False),
        (Rule(0.2, (0.2, 0.3)), False, True),
        (Rule(1.0, 1.0, patience=2), False, True),
        (Rule(1.0, 1.0, experts=2), False, False),
        (Rule(1.0, 1.0, substitute=0.1), False, False),
    ],
)
def test_what_it_comes_to(rule: Rule, is_exact: bool, needs_low: bool) -> None:
    assert (rule.is_exact, rule.needs_low) == (is_exact, needs_low)


@pytest.mark.parametrize(
    ("t1", "t2"), [(0.9, 0.6), (1.0, 0.999), ((0.1, 0.9), 0.5), (0.3, (0.5, 0.2)), (0.0, -1.0)]
)
def test_t1_above_t2(t1: float, t2: float) -> None:
    with pytest.raises(UsageError) as refused:
        Rule(t1, t2)
    assert str(refused.value) == f"T1 is {t1} and T2 is {t2}: T1 must not be above T2"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, (0.1, math.nan)])
def test_what_is_no_number(bad: float) -> None:
    with pytest.raises(UsageError, match=r"T1 is .*(nan|inf).*: must be a number from 0 to 1"):
        Rule(bad, 1.0)
    with pytest.raises(UsageError, match=r"T2 is .*(nan|inf).*: must be a number from 0 to 1"):
        Rule(-1.0, bad)


def test_thresholds_of_groups() -> None:
    assert Rule(0.2, 0.7).thresholds(3) == ([0.2] * 3, [0.7] * 3)
    assert Rule((0.1, 0.2), 0.7).thresholds(2) == ([0.1, 0.2], [0.7, 0.7])
    assert Rule(0.1, (0.2, 0.3)).thresholds(2) == ([0.1, 0.1], [0.2, 0.3])
    assert Rule((0.1,), (0.2,)).thresholds(3) == ([0.1] * 3, [0.2] * 3)
    with pytest.raises(UsageError, match="the thresholds are for 2 layers, not for 3"):
        Rule((0.1, 0.2), 0.7).thresholds(3)
    with pytest.raises(UsageError, match="T1 has 2 values and T2 has 3"):
        Rule((0.1, 0.2), (0.3, 0.4, 0.5))


def test_it_is_a_value() -> None:
    rule = Rule(0.2, 0.7)
    assert {rule: 1}[Rule(0.2, 0.7)] == 1
    assert replace(rule, deterministic=True) != rule
    with pytest.raises(FrozenInstanceError):
        rule.t1 = 0.3  # type: ignore[misc]
