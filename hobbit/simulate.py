"""What a cache would have done with a routing trace: the engine's own cache and policies, without
the model. native/simulate.h says what is replayed, and docs/policies.md what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import check, error_buffer, ffi, lib
from .errors import UsageError
from .memory import Pool, SlotBytes, fill
from .policy import Policy
from .rule import EXACT, Rule
from .sizes import format_size
from .structs import policy_struct, rule_struct
from .trace import FORGET, LAYER, SEQUENCE, Trace

Longs = npt.NDArray[np.int64]

_EVENT_ARRAYS = (
    "kind", "group", "n_rows", "n_used", "has_weights", "row_at", "pair_at", "prob_at",
)  # fmt: skip
_FLAT_ARRAYS = {"row_at": "token", "pair_at": "experts", "prob_at": "probs"}
_OUT_ARRAYS: dict[str, tuple[Any, str]] = {
    "hits": (np.uint32, "uint32_t"),
    "misses": (np.uint32, "uint32_t"),
    "evictions": (np.uint32, "uint32_t"),
    "read_bytes": (np.uint64, "uint64_t"),
    "read_low_bytes": (np.uint64, "uint64_t"),
    "seconds": (np.float64, "double"),
}
_COUNTERS = ("promotions", "stand_ins", "ahead", "ahead_used", "ahead_wasted_bytes", "crowded")


@dataclass(frozen=True)
class Machine:
    """How fast things are: `disk` bytes a second (0: reading takes no time), and the seconds that
    computing a token takes, of which each layer has the same share."""

    disk: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """What was counted. The arrays are [n_events] of the trace: a layer's are at its event.

    pairs: (token, expert) pairs by precision, high, low and skipped.
    promotions, stand_ins, ahead, ahead_used, ahead_wasted_bytes: as in the engine's stats.
    crowded: layers that needed more experts at once than the cache had room for. In the engine it
    then depends on the order of arrivals who is evicted, so that its numbers may differ a little.
    """

    hits: Longs
    misses: Longs
    evictions: Longs
    read_bytes: Longs
    read_low_bytes: Longs
    seconds: npt.NDArray[np.float64]
    pairs: tuple[int, int, int]
    promotions: int
    stand_ins: int
    ahead: int
    ahead_used: int
    ahead_wasted_bytes: int
    crowded: int


def pools_of(trace: Trace, budget: int) -> tuple[Pool, ...]:
    """Divide bytes into the pools that the engine would make; raises UsageError if too few."""
    pools, n_used = [], _n_expert_used(trace)
    for index, pool in enumerate(trace.pools):
        groups = tuple(g for g, group in enumerate(trace.groups) if group.pool == index)
        counts = [trace.groups[g].n_expert for g in groups]
        floor = max(min(n_used, count) for count in counts)
        pools.append(Pool(SlotBytes(*pool.slot_bytes), floor, sum(counts), floor, groups))
    least = sum(pool.bytes for pool in pools)
    if budget < least:
        raise UsageError(
            f"a cache of {format_size(budget)} is too small: one layer of a token needs "
            f"{format_size(least)}"
        )
    return fill(pools, min(budget, all_bytes(trace)))


def _n_expert_used(trace: Trace) -> int:
    """Return the most experts that a token uses of a layer: as noted, or else as seen."""
    noted = trace.note.get("n_expert_used")
    seen = int(trace.n_used[trace.kind == LAYER].max(initial=1))
    return max(noted, seen) if isinstance(noted, int) else seen


def all_bytes(trace: Trace) -> int:
    """Return the size of a cache that holds every expert in high precision."""
    return sum(g.n_expert * trace.pools[g.pool].slot_bytes[0] for g in trace.groups)


def tokens_before(trace: Trace) -> Longs:
    """Return for each event how many tokens were computed before its pass through the layers."""
    before = np.zeros(len(trace), dtype=np.int64)
    done = width = 0
    last = -1
    columns = (trace.kind.tolist(), trace.group.tolist(), trace.n_rows.tolist())
    for i, (kind, group, rows) in enumerate(zip(*columns, strict=True)):
        if kind == LAYER:
            if group < last or len(trace.groups) == 1:
                done, width = done + width, 0
            last, width = group, max(width, rows)
        elif kind in (SEQUENCE, FORGET):
            done, width, last = done + width, 0, -1
        before[i] = done
    return before


def n_tokens(trace: Trace) -> int:
    """Return how many tokens a trace has, in all its sequences."""
    before = tokens_before(trace)
    if not len(before):
        return 0
    last = (before == before[-1]) & (trace.kind == LAYER)
    return int(before[-1] + trace.n_rows[last].max(initial=0))


def first(trace: Trace, tokens: int) -> Trace:
    """Return the trace of the first so many tokens, rounded up to whole passes."""
    return _chosen(trace, tokens_before(trace) < tokens)


def without_sequences(trace: Trace) -> Trace:
    """Return the trace as of one sequence: where another began is left out."""
    return _chosen(trace, trace.kind != SEQUENCE)


def _chosen(trace: Trace, events: npt.NDArray[np.bool_]) -> Trace:
    chosen: dict[str, Any] = {name: getattr(trace, name)[events] for name in _EVENT_ARRAYS}
    return replace(trace, **chosen)


def joined(traces: Sequence[Trace]) -> Trace:
    """Return traces of one model as one, in which each begins another sequence."""
    whole = traces[0]
    for more in traces[1:]:
        if (more.note.get("model"), more.groups) != (whole.note.get("model"), whole.groups):
            raise UsageError(f"{more.path} is of another model than {whole.path}")
        whole = _after(whole, more)
    return whole


def _after(one: Trace, two: Trace) -> Trace:
    """Join two traces, with the beginning of a sequence between them."""
    between: dict[str, Any] = {"kind": SEQUENCE, "group": -1, "n_rows": 1, "prob_at": -1}
    flat = ("sequence", "token", "experts", "weights", "probs")
    merged: dict[str, Any] = {
        name: np.concatenate([getattr(one, name), getattr(two, name)]) for name in flat
    }
    # The event between has a row of its own: another sequence than any before.
    row, number = len(one.token), int(one.sequence.max(initial=0)) + 1
    merged["sequence"] = np.insert(merged["sequence"], row, number)
    merged["sequence"][row + 1 :] += number
    merged["token"] = np.insert(merged["token"], row, 0)
    for name in _EVENT_ARRAYS:
        a, b = getattr(one, name), getattr(two, name)
        middle = np.array([between.get(name, 0)], dtype=a.dtype)
        if name in _FLAT_ARRAYS:
            offset = len(getattr(one, _FLAT_ARRAYS[name])) + (name == "row_at")
            b = np.where(b >= 0, b + offset, b)
            middle[0] = row if name == "row_at" else between.get(name, 0)
        merged[name] = np.concatenate([a, middle, b])
    return replace(one, **merged)


def simulate(
    trace: Trace,
    pools: Sequence[Pool],
    policy: Policy,
    rule: Rule = EXACT,
    machine: Machine = Machine(),
    *,
    predicted: bool = False,
    odds: float = 0.0,
) -> Simulated:
    """Replay a trace from an empty cache; `predicted` takes in the predictions that it has,
    and reads ahead what was predicted with at least these odds.

    Raises UsageError for a rule that asks for low copies, or gate weights, that the trace does not
    have, for cache-aware routing, whose choices are not in it, and for nested copies.
    """
    _check(trace, rule)
    keep, n = _Kept(), len(trace)
    native_rule = rule_struct(rule, len(trace.groups))
    events = ffi.new("struct hobbit_routing *")
    events.n_events, events.n_pairs = n, len(trace.experts)
    for name, kind in (
        ("kind", "uint8_t"), ("group", "int32_t"), ("n_rows", "int32_t"), ("n_used", "int32_t"),
        ("pair_at", "int64_t"), ("has_weights", "uint8_t"), ("experts", "int32_t"),
        ("weights", "float"),
    ):  # fmt: skip
        setattr(events, name, keep.array(kind, getattr(trace, name)))
    given = ffi.new("struct hobbit_simulation *")
    _describe_cache(given, keep, trace, pools)
    given.policy = policy_struct(policy, _low_cost(trace))[0]
    given.rule = native_rule.pointer[0]
    given.predicted, given.least_odds = predicted, odds
    given.disk_bytes_s = machine.disk
    given.compute_s = machine.compute_s / len(trace.groups)
    out = ffi.new("struct hobbit_simulated *")
    counted = {name: np.zeros(n, dtype=kind) for name, (kind, _) in _OUT_ARRAYS.items()}
    for name, array in counted.items():
        setattr(out, name, keep.array(_OUT_ARRAYS[name][1], array))
    error = error_buffer()
    status = lib.hobbit_simulate(events, given, out, error, len(error))
    if status == lib.HOBBIT_ARG:
        raise UsageError(ffi.string(error).decode(errors="replace"))
    check(status, error)
    seconds = counted.pop("seconds")
    found: dict[str, Any] = {name: array.astype(np.int64) for name, array in counted.items()}
    found |= {name: int(getattr(out, name)) for name in _COUNTERS}
    return Simulated(seconds=seconds, pairs=tuple(out.pairs), **found)


def _check(trace: Trace, rule: Rule) -> None:
    if rule.substitute:
        raise UsageError("cache-aware routing cannot be replayed: it changes what is chosen")
    if trace.note.get("nested"):
        raise UsageError(
            f"{trace.path}: is of a nested copy, whose high copies are made from low ones: that is "
            "not simulated; record the trace with the model it was made from"
        )
    if rule.needs_low and not all(group.expert_bytes[1] for group in trace.groups):
        raise UsageError(
            f"{trace.path}: has no low-precision copies: hobbit prepare makes them, and a trace "
            "recorded beside them has their sizes"
        )


def _low_cost(trace: Trace) -> float:
    low, high = (sum(group.expert_bytes[p] for group in trace.groups) for p in (1, 0))
    return low / high if high else 0.0


class _Kept:
    """Arrays as C pointers, for as long as this lives."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def array(self, kind: str, values: npt.NDArray[Any]) -> Any:
        buffer = ffi.from_buffer(np.ascontiguousarray(values))
        self._kept.append(buffer)
        return ffi.cast(f"{kind} *", buffer)

    def new(self, kind: str, values: Sequence[Any]) -> Any:
        self._kept.append(ffi.new(kind, values))
        return self._kept[-1]


def _describe_cache(given: Any, keep: _Kept, trace: Trace, pools: Sequence[Pool]) -> None:
    groups = trace.groups
    given.n_groups, given.n_pools = len(groups), len(pools)
    given.n_expert = keep.new("int32_t[]", [group.n_expert for group in groups])
    given.pool_of_group = keep.new("int32_t[]", [group.pool for group in groups])
    sizes = [size for group in groups for size in group.expert_bytes]
    given.expert_bytes = keep.new("uint64_t[]", sizes)
    given.pools = keep.new(
        "struct hobbit_pool[]",
        [
            {
                "bytes": pool.bytes,
                "slot_bytes": [*pool.slot_bytes],
                "n_slots": [pool.slots, pool.low_slots],
            }
            for pool in pools
        ],
    )
