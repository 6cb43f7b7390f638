"""How a device's slots are divided between high and low copies: by what is used more for a byte.

High and low copies have stacks of their own there, so the division is fixed when the model is
loaded, by the rule in force then. Uses are taken to fall with the rank of an expert as 1, 1/2, 1/3
and so on; then the last copy of either kind is worth as much for its bytes as that of the other at
these numbers of slots:

- by a deterministic rule, which uses the copy that is needed whatever else is there: as pairs need
  them;
- otherwise a high copy serves what needs low too, and the low one beside it serves nothing. With h
  and l for the shares of pairs that need high and low, and b for the bytes of a low copy over those
  of a high one, that is l (1 - b) / h - 1 low copies for each high one: none unless half as many
  pairs again need low as need high, where b is a third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .layout import ExpertGroup, Layout
from .quality import Quality
from .rule import Rule


@dataclass(frozen=True)
class Mix:
    """The share of low copies among the slots; `beside`: those of experts that are there in high.

    Where they are of no use beside a high copy, there are slots for the other experts at most.
    """

    low: float = 0.0
    beside: bool = False


ALL_HIGH = Mix()


def mix_for(layout: Layout, quality: Quality) -> Mix:
    """Return the mix for a model with its low copies, as far as the quality asks for them.

    What pairs need is what calibration measured, where it did.
    """
    rule = quality.rule
    if layout.low is None or not rule.needs_low:
        return ALL_HIGH
    point = quality.point
    high, low = (point.high, point.low) if point else needs(rule, layout)
    if high + low <= 0:
        return ALL_HIGH
    if rule.deterministic or high <= 0:
        return Mix(low / (high + low), beside=True)
    smaller = _bytes(layout.low.groups) / _bytes(layout.groups)
    per_high = max(low * (1 - smaller) / high - 1, 0.0)
    return Mix(per_high / (1 + per_high))


def needs(rule: Rule, layout: Layout) -> tuple[float, float]:
    """Return the shares of pairs that need high and low by thresholds that were given by hand.

    As if all gate weights of a token were equal: the real ones are not, and fewer pairs need high.
    """
    used = layout.n_expert_used
    t1, t2 = rule.thresholds(len(layout.groups))
    high = sum(_share_up_to(threshold, used) for threshold in t1) / len(t1)
    some = sum(_share_up_to(threshold, used) for threshold in t2) / len(t2)
    return high, some - high


def _share_up_to(threshold: float, used: int) -> float:
    """The share of i / used, i from 0 to used - 1, that is not above the threshold."""
    return min(max(math.floor(threshold * used) + 1, 0), used) / used


def _bytes(groups: tuple[ExpertGroup, ...]) -> int:
    return sum(group.expert_bytes * group.n_expert for group in groups)
