"""Cache policies side by side on routing traces, at several sizes of the cache."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .memory import Pool
from .policy import BELADY, POLICIES, SIMULATED, Policy, parse_policy
from .rule import Rule
from .simulate import (
    Machine,
    Simulated,
    all_bytes,
    first,
    joined,
    n_tokens,
    pools_of,
    simulate,
    tokens_before,
    without_sequences,
)
from .sizes import format_size, parse_size
from .trace import PREDICTED, read_trace
from .tune import SETTINGS, sweep, tune

BUDGETS = ("25%", "50%", "75%")
PREDICTIONS = ("none", "recorded")

_SLOTS = re.compile(r"(\d+)\s*slots?")


@dataclass(frozen=True)
class LabOptions:
    """One value for each flag of `hobbit simulate`, by the name of its parameter."""

    traces: tuple[Path, ...]
    policy: tuple[str, ...] = ()
    budget: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    tune: bool = False
    predict: str = "none"
    odds: float = 0.0
    t1: float | None = None
    t2: float | None = None
    patience: int = 0
    deterministic: bool = False
    tokens: int = 0
    skip: int = 0
    one_sequence: bool = False
    disk: str = "500M"
    compute_ms: float = 90.0
    plot: Path | None = None
    json_output: bool = False

    def __post_init__(self) -> None:
        if self.predict not in PREDICTIONS:
            raise UsageError(f"--predict {self.predict}: must be one of {', '.join(PREDICTIONS)}")
        if self.tune and self.sweep:
            raise UsageError("--tune and --sweep: a run does one of the two")
        if self.tune and any(parse_policy(p, SIMULATED).name not in SETTINGS for p in self.policy):
            raise UsageError(f"--tune: only {' and '.join(SETTINGS)} have settings")

    @property
    def rule(self) -> Rule:
        """Who gets which precision, by thresholds: T1 is T2 if only that is given."""
        t2 = 1.0 if self.t2 is None else self.t2
        t1 = t2 if self.t1 is None else self.t1
        return Rule(t1, t2, deterministic=self.deterministic, patience=self.patience)

    @property
    def machine(self) -> Machine:
        return Machine(float(parse_size(self.disk)), self.compute_ms / 1000)

    @property
    def policies(self) -> list[Policy]:
        """Those to compare: as named, or all; where settings are varied, all that have some."""
        named = [parse_policy(text, SIMULATED) for text in self.policy]
        grid = dict(map(_grid, self.sweep))
        if self.tune or grid:
            heeding = [
                p for p in POLICIES.values() if grid.keys() <= SETTINGS.get(p.name, {}).keys()
            ]
            return sweep(named or [p for p in heeding if p.name in SETTINGS], grid)
        return named or [*SIMULATED.values()]


@dataclass(frozen=True)
class LabRow:
    """What one policy comes to with one cache; warm-up left out, but for `crowded`.

    slots, cache_bytes: of the cache, high copies. against_lru: bytes read, of those that LRU reads.
    closed: of what LRU reads and Belady does not, the share that is not read. tok_s follows from
    the model of time in docs/policies.md, roofline_tok_s is what no cache and no predictor that
    reads as much can exceed. crowded: see `hobbit.simulate.Simulated`.
    """

    policy: str
    budget: str
    slots: int
    cache_bytes: int
    tokens: int
    hits: int
    misses: int
    evictions: int
    read_bytes: int
    read_low_bytes: int
    against_lru: float
    closed: float
    tok_s: float
    roofline_tok_s: float
    crowded: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.read_bytes / max(self.tokens, 1)


class Lab:
    """A trace, and all that is the same for every policy and cache."""

    def __init__(self, options: LabOptions) -> None:
        self.rule, self.machine = options.rule, options.machine
        self.predicted, self.odds = options.predict == "recorded", options.odds
        trace = joined([read_trace(path.expanduser()) for path in options.traces])
        if options.one_sequence:
            trace = without_sequences(trace)
        self.trace = first(trace, options.tokens) if options.tokens else trace
        tokens = n_tokens(self.trace)
        if options.skip >= tokens:
            raise UsageError(f"--skip {options.skip}: the trace has {tokens} tokens")
        if self.predicted and not (self.trace.kind == PREDICTED).any():
            raise UsageError("--predict recorded: the trace has no predictions")
        self._counted = tokens_before(self.trace) >= options.skip
        # Passes are whole: the first that counts may begin later than --skip says.
        self.tokens = tokens - int(tokens_before(self.trace)[self._counted].min(initial=tokens))
        self._bytes: dict[tuple[Policy, tuple[Pool, ...]], int] = {}

    def pools(self, budget: str) -> tuple[Pool, ...]:
        """Return the cache of a size: `4G`, `50%` of all experts, or `200 slots`."""
        everything = all_bytes(self.trace)
        slots = _SLOTS.fullmatch(budget.strip())
        if slots:
            experts = sum(group.n_expert for group in self.trace.groups)
            return pools_of(self.trace, everything * int(slots[1]) // experts)
        if not budget.strip().endswith("%"):
            return pools_of(self.trace, parse_size(budget))
        try:
            share = float(budget.strip()[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UsageError(f"--budget {budget}: write it like 4G, 50% or '200 slots'")
        return pools_of(self.trace, int(everything * share))

    def run(self, policy: Policy, pools: tuple[Pool, ...]) -> Simulated:
        return simulate(
            self.trace,
            pools,
            policy,
            self.rule,
            self.machine,
            predicted=self.predicted,
            odds=self.odds,
        )

    def read_bytes(self, policy: Policy, pools: tuple[Pool, ...]) -> int:
        """Return what a policy reads."""
        if (policy, pools) not in self._bytes:
            found = self.run(policy, pools)
            self._bytes[policy, pools] = int(found.read_bytes[self._counted].sum())
        return self._bytes[policy, pools]

    def row(self, policy: Policy, budget: str) -> LabRow:
        pools = self.pools(budget)
        found, counted = self.run(policy, pools), self._counted
        read = int(found.read_bytes[counted].sum())
        lru, belady = (self.read_bytes(p, pools) for p in (POLICIES["lru"], BELADY))
        seconds = float(found.seconds[counted].sum())
        disk = read / self.machine.disk if self.machine.disk else 0.0
        least = max(self.tokens * self.machine.compute_s, disk)
        return LabRow(
            policy=str(policy),
            budget=budget,
            slots=sum(pool.slots for pool in pools),
            cache_bytes=sum(pool.bytes for pool in pools),
            tokens=self.tokens,
            hits=int(found.hits[counted].sum()),
            misses=int(found.misses[counted].sum()),
            evictions=int(found.evictions[counted].sum()),
            read_bytes=read,
            read_low_bytes=int(found.read_low_bytes[counted].sum()),
            against_lru=read / lru if lru else math.nan,
            closed=(lru - read) / (lru - belady) if lru != belady else math.nan,
            tok_s=self.tokens / seconds if seconds else math.inf,
            roofline_tok_s=self.tokens / least if least else math.inf,
            crowded=found.crowded,
        )

    def tuned(self, policy: Policy, budgets: Sequence[str]) -> tuple[Policy, float]:
        """Return the settings that read least, in the mean of the ratios to LRU over the caches."""
        caches = [self.pools(budget) for budget in budgets]

        def cost(tried: Policy) -> float:
            lru = POLICIES["lru"]
            return float(
                np.mean(
                    [self.read_bytes(tried, c) / max(self.read_bytes(lru, c), 1) for c in caches]
                )
            )

        return tune(policy, cost)

    def notes(self, rows: Sequence[LabRow]) -> Iterator[str]:
        """Yield what a reader of the rows should know."""
        cached = self.trace.note.get("cached", 0)
        if cached:
            yield (
                f"the trace began with {cached} copies cached, the simulation begins with none: "
                "use --skip"
            )
        if self.trace.note.get("low_is_resident"):
            yield "the recorded run kept all low copies, which the simulation does not"
        crowded = max((row.crowded for row in rows), default=0)
        if crowded:
            yield (
                f"in up to {crowded} layers more experts are needed at once than fit: in a run it "
                "depends on what arrives first who is evicted, so that its numbers may differ"
            )

    def facts(self) -> dict[str, Any]:
        """Return what was simulated, as plain data."""
        note = self.trace.note
        return {
            "model": note.get("name"),
            "model_fingerprint": note.get("model"),
            "tokens": self.tokens,
            "all_bytes": all_bytes(self.trace),
            "rule": {"t1": self.rule.t1, "t2": self.rule.t2, "patience": self.rule.patience},
            "predicted": self.predicted,
            "odds": self.odds,
            "disk_bytes_s": self.machine.disk,
            "compute_s": self.machine.compute_s,
        }

    def title(self) -> str:
        return (
            f"{self.trace.note.get('name')}: {self.tokens} tokens, "
            f"{format_size(all_bytes(self.trace))} of experts"
        )


def compare(lab: Lab, policies: Sequence[Policy], budgets: Sequence[str]) -> list[LabRow]:
    """Return a row for each cache and policy, cache by cache."""
    return [lab.row(policy, budget) for budget in budgets for policy in policies]


def _grid(text: str) -> tuple[str, list[float]]:
    """Read `half_life=32,64`, each value as parse_policy does."""
    name, _, values = text.partition("=")
    policies = [parse_policy(f"decay:{name}={value}") for value in values.split(",")]
    return name, [getattr(policy, name) for policy in policies]
