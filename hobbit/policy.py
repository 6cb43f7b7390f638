"""Who is evicted from the expert cache; native/policy.h has the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class Policy:
    """A cache policy. The weights are those of HOBBIT's equation 3; `half_life` is in tokens."""

    name: str
    w_lru: float = 0.0
    w_lfu: float = 0.0
    w_lhu: float = 0.0
    w_fld: float = 0.0
    half_life: float = 128.0

    def __str__(self) -> str:
        known = SIMULATED[self.name]
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(known, f.name)]
        settings = ",".join(f"{name}={getattr(self, name):g}" for name in names)
        return f"{self.name}:{settings}" if settings else self.name


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("decay", w_fld=0.2),
        Policy("hobbit", w_lru=0.05, w_lfu=0.7, w_lhu=0.2, w_fld=0.05),
        Policy("lcu"),
        Policy("lfru"),
        Policy("lfu"),
        Policy("lru"),
    )
}
DEFAULT = POLICIES["decay"]
# Who is used next latest goes first (Belady): the least misses, but it takes knowing the future.
BELADY = Policy("belady")
SIMULATED = POLICIES | {BELADY.name: BELADY}


def parse_policy(text: str, known: Mapping[str, Policy] = POLICIES) -> Policy:
    """Read `NAME` or `NAME:w_fld=0.1,half_life=64`; raise UsageError."""
    name, _, settings = text.partition(":")
    if name not in known:
        raise UsageError(f"there is no cache policy {name!r}: use one of {', '.join(known)}")
    changed: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if key == "name" or key not in Policy.__dataclass_fields__:
            names = ", ".join(f.name for f in fields(Policy) if f.name != "name")
            raise UsageError(f"a cache policy has no setting {key!r}: use {names}")
        if not 0 <= number <= 1e6 or (key == "half_life" and number < 1):
            raise UsageError(f"{key}={value} makes no sense: use a number, such as {key}=1")
        changed[key] = number
    return replace(known[name], **changed)
