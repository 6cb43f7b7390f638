"""Our own types as the C library's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._native import ffi, lib
from .policy import BELADY, Policy
from .rule import Rule


def policy_struct(policy: Policy, low_cost: float) -> Any:
    """Return a struct hobbit_policy; `low_cost` is the bytes of low copies over those of high."""
    kind = "FARTHEST" if policy.name == BELADY.name else policy.name.upper()
    return ffi.new(
        "struct hobbit_policy *",
        {
            "kind": getattr(lib, f"HOBBIT_POLICY_{kind}"),
            "w_lru": policy.w_lru,
            "w_lfu": policy.w_lfu,
            "w_lhu": policy.w_lhu,
            "w_fld": policy.w_fld,
            "half_life": policy.half_life,
            "low_cost": low_cost,
        },
    )


@dataclass(frozen=True)
class RuleStruct:
    """A struct hobbit_rule, with the thresholds that it points to."""

    pointer: Any
    thresholds: tuple[Any, Any]


def rule_struct(rule: Rule, n_groups: int) -> RuleStruct:
    """Return a rule for so many groups; raises UsageError when it is for another model."""
    t1, t2 = (ffi.new("float[]", values) for values in rule.thresholds(n_groups))
    native = {
        "t1": t1,
        "t2": t2,
        "deterministic": rule.deterministic,
        "renormalise": rule.renormalise,
        "per_token": rule.per_token,
        "substitute": rule.substitute,
        "experts": rule.experts,
        "reversed": rule.reversed,
        "patience": rule.patience,
    }
    return RuleStruct(ffi.new("struct hobbit_rule *", native), (t1, t2))
