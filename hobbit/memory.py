"""How much memory there is, and how a model divides it.

The cap counts everything the process holds. The plan is arithmetic, done before anything is
allocated: its lines and the spare add up to the cap, and what does not fit is refused with the
smallest cap that would work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import PlanError, UsageError
from .layout import Layout
from .sizes import format_size, parse_size

# Other programs take from the machine's memory at any time; a cgroup is mostly the process's own.
MIN_HEADROOM = 512 << 20
MIN_CGROUP_HEADROOM = 64 << 20
HEADROOM_SHARE = 0.10

# Version 1 writes "no limit" as a number near 2^63.
_NO_LIMIT = 1 << 60

_ROOT = Path("/")


@dataclass(frozen=True)
class Cap:
    """The bytes the process may hold, and why that many."""

    bytes: int
    reason: str


@dataclass(frozen=True)
class Line:
    """One part of the plan."""

    name: str
    bytes: int
    reason: str = ""


class SlotBytes(NamedTuple):
    """Bytes that one cached expert takes in the high and in the low precision (0: no copy)."""

    high: int
    low: int = 0


@dataclass(frozen=True)
class Pool:
    """Memory of the expert groups (by index) whose slots have this size.

    `slots` high copies fit; where there are low ones, both kinds share the bytes.
    """

    slot_bytes: SlotBytes
    slots: int
    experts: int
    floor: int
    groups: tuple[int, ...]
    nested: bool = False

    @property
    def extra(self) -> int:
        """Bytes for the planes that a nested model's high copies are made from."""
        return self.floor * self.slot_bytes.low if self.nested else 0

    @property
    def bytes(self) -> int:
        return self.slot_bytes.high * self.slots + self.extra

    @property
    def low_slots(self) -> int:
        """The most low copies that fit."""
        low = self.slot_bytes.low
        return min(self.experts, self.bytes // low) if low else 0

    @property
    def token_slots(self) -> int:
        """High copies that one token uses in all layers."""
        return min(self.experts, self.floor * len(self.groups))

    @property
    def beside_low(self) -> int:
        """High copies that fit beside all low ones; below 0 if those do not fit."""
        return (self.bytes - self.experts * self.slot_bytes.low) // self.slot_bytes.high


@dataclass(frozen=True)
class MemoryPlan:
    """What the cap is spent on."""

    cap: Cap
    lines: tuple[Line, ...]
    pools: tuple[Pool, ...]
    mode: Literal["streamed", "resident-experts", "resident"]
    cache_bytes: int
    floor_bytes: int
    token_bytes: int
    low_is_resident: bool = False
    device: Line | None = None  # in memory of its own
    layers: tuple[Line, ...] = ()  # of llama.cpp's, in memory of devices

    @property
    def low_fits(self) -> bool:
        """Whether all low copies can stay cached beside the high ones of one layer of a token."""
        return all(pool.slot_bytes.low and pool.beside_low >= pool.floor for pool in self.pools)

    @property
    def low_resident_bytes(self) -> int:
        """The smallest cap with which all low copies can stay cached."""
        least = sum(
            pool.experts * pool.slot_bytes.low + pool.floor * pool.slot_bytes.high
            for pool in self.pools
        )
        return self.cap.bytes - self.spare_bytes - self.cache_bytes + least

    def with_resident_low(self) -> MemoryPlan:
        """Return the plan in which all low copies stay cached."""
        high, experts = (sum(getattr(p, n) for p in self.pools) for n in ("beside_low", "experts"))
        reason = f"all {experts} experts in low precision, {high} of them in high too"
        lines = [replace(x, reason=reason) if x.name == "experts" else x for x in self.lines]
        return replace(self, lines=tuple(lines), low_is_resident=True)

    @property
    def spare_bytes(self) -> int:
        return self.cap.bytes - sum(line.bytes for line in self.lines)

    @property
    def below_cliff(self) -> bool:
        """Whether the cache holds less than one token uses.

        What a token uses then evicts what the next one needs first: where the least recently used
        expert goes, hardly anything that is asked for is there.
        """
        streamed = self.mode == "streamed" and not self.low_is_resident
        return streamed and _below_cliff(self.pools)

    @property
    def above_cliff_bytes(self) -> int:
        """A cap, of whole MiB, with which the cache holds what one token uses."""
        fixed = self.cap.bytes - self.spare_bytes - self.cache_bytes
        needed = fixed + _cliff_budget(self.pools)
        # The process's page tables grow with the cap.
        growth = max(needed - self.cap.bytes, 0) // 100 + (16 << 20)
        return -(-(needed + growth) >> 20) << 20

    @property
    def cached_share(self) -> float:
        """The share of all experts that has a slot."""
        experts = sum(pool.experts for pool in self.pools)
        return sum(pool.slots for pool in self.pools) / experts if experts else 1.0

    @property
    def beside(self) -> list[Line]:
        """What is in memory of devices, and not part of the cap."""
        return [*self.layers, *([self.device] if self.device else [])]

    def describe(self) -> str:
        """Write the plan as a table of name, size and reason."""
        rows = [*self.lines, Line("spare", self.spare_bytes, "not used")]
        rows.append(Line("cap", self.cap.bytes, self.cap.reason))
        rows += self.beside
        text = [f"{row.name:<9}{format_size(row.bytes):>12}  {row.reason}".rstrip() for row in rows]
        if self.below_cliff:
            text.append(
                f"the cache is smaller than what one token uses ({format_size(self.token_bytes)}): "
                f"expect few hits; --memory {self.above_cliff_bytes >> 20}M is enough for that"
            )
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "mode": self.mode,
            "cap_bytes": self.cap.bytes,
            "cap_reason": self.cap.reason,
            "lines": [asdict(line) for line in self.lines],
            "spare_bytes": self.spare_bytes,
            "pools": [asdict(pool) for pool in self.pools],
            "cache_bytes": self.cache_bytes,
            "floor_bytes": self.floor_bytes,
            "token_bytes": self.token_bytes,
            "low_is_resident": self.low_is_resident,
            "device": asdict(self.device) if self.device else None,
            "layers": [asdict(line) for line in self.layers],
            "below_cliff": self.below_cliff,
            "above_cliff_bytes": self.above_cliff_bytes if self.below_cliff else None,
        }


def available_memory(root: Path = _ROOT) -> tuple[int, str]:
    """Return what can still be used without swapping or being killed, and what limits it."""
    return min((free, reason) for free, reason, _ in _limits(root))


def _limits(root: Path) -> Iterator[tuple[int, str, int]]:
    """Yield what each limit leaves, its name, and the headroom it needs."""
    free = _meminfo(root).get("MemAvailable")
    if free is None:
        free, reason = _physical() // 2, "half of the machine's memory: its use is not known here"
    else:
        reason = "available on this machine"
    yield free, reason, max(MIN_HEADROOM, int(free * HEADROOM_SHARE))
    for limit, used, where in _cgroups(root):
        free = max(limit - used, 0)
        headroom = max(MIN_CGROUP_HEADROOM, int(free * HEADROOM_SHARE))
        yield free, f"left of the {format_size(limit)} cgroup {where}", headroom


def total_memory(root: Path = _ROOT) -> tuple[int, str]:
    """Return the memory of the machine, or of the smallest cgroup the process is in."""
    choices = [(_meminfo(root).get("MemTotal") or _physical(), "this machine's memory")]
    choices += [(limit, f"the limit of cgroup {where}") for limit, _, where in _cgroups(root)]
    return min(choices)


def resolve_cap(text: str | int, root: Path = _ROOT) -> Cap:
    """Turn `8G`, `50%`, `auto` or a number of bytes into a cap.

    A cap above the machine's or the cgroup's limit would get the process killed, so it is lowered.
    """
    total, limit = total_memory(root)
    if text == "auto":
        free, reason, headroom = min(_limits(root), key=lambda limit: limit[0] - limit[2])
        return Cap(max(free - headroom, 0), f"auto: {reason}, less {format_size(headroom)}")
    if isinstance(text, str) and text.strip().endswith("%"):
        size, reason = int(total * _percentage(text)), f"{text.strip()} of {limit}"
    else:
        size, reason = parse_size(text) if isinstance(text, str) else text, "as asked"
    if size <= 0:
        raise UsageError(f"a memory cap of {text!r} leaves nothing: write it like 8G, 50% or auto")
    if size > total:
        return Cap(total, f"{format_size(size)} asked, but {limit} is {format_size(total)}")
    free, _ = available_memory(root)
    if size > free:
        reason += f"; only {format_size(free)} is available now"
    return Cap(size, reason)


def _percentage(text: str) -> float:
    try:
        value = float(text.strip()[:-1])
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise UsageError(f"{text!r} is not a share of memory: write it like 50%")
    return value / 100


def plan(
    cap: Cap,
    layout: Layout,
    parts: Sequence[Line],
    slot_bytes: Sequence[SlotBytes] = (),
    cache: int | Literal["floor"] | None = None,
) -> MemoryPlan:
    """Divide the cap between the fixed `parts` and the expert cache, or raise PlanError.

    `slot_bytes` has one size per group of the layout (default: the size of its experts). `cache`
    replaces the size of the cache that the cap would allow.
    """
    bare = [SlotBytes(group.expert_bytes) for group in layout.groups]
    pools = _floor_pools(layout, slot_bytes or bare)
    fixed = sum(part.bytes for part in parts)
    floor = sum(pool.bytes for pool in pools)
    if cache is None:
        budget = cap.bytes - fixed
    else:
        everything = sum(pool.slot_bytes.high * pool.experts + pool.extra for pool in pools)
        budget = floor if cache == "floor" else min(cache, everything)
        if budget < floor:
            raise PlanError(f"a cache of {cache} bytes is below the floor, {floor}", floor)
    if budget < floor or fixed + budget > cap.bytes:
        raise _too_small(cap, [*parts, Line("experts", floor if cache is None else budget)])
    pools = fill(pools, budget)
    cached = sum(pool.bytes for pool in pools)
    lines = list(parts)
    if pools:
        lines.append(Line("experts", cached, _cache_reason(pools)))
    full = all(pool.slots == pool.experts for pool in pools)
    return MemoryPlan(
        cap=cap,
        lines=tuple(lines),
        pools=pools,
        mode="resident" if not pools else "resident-experts" if full else "streamed",
        cache_bytes=cached,
        floor_bytes=fixed + floor,
        token_bytes=sum(pool.slot_bytes.high * pool.token_slots for pool in pools),
    )


def _floor_pools(layout: Layout, slot_bytes: Sequence[SlotBytes]) -> tuple[Pool, ...]:
    """Make one pool per slot size, with just the slots that one token needs in one layer."""
    sizes: dict[SlotBytes, list[int]] = {}
    for group, size in zip(layout.groups, slot_bytes, strict=True):
        sizes.setdefault(size, []).append(group.index)
    pools = []
    for size, members in sizes.items():
        counts = [layout.groups[index].n_expert for index in members]
        floor = max(min(layout.n_expert_used, count) for count in counts)
        nested = any(layout.groups[index].matrices[0].plane_bytes for index in members)
        pools.append(Pool(size, floor, sum(counts), floor, tuple(members), nested))
    return tuple(pools)


def fill(pools: Sequence[Pool], budget: int) -> tuple[Pool, ...]:
    """Give the budget to the pools in proportion to the bytes of their experts."""
    slots = [pool.slots for pool in pools]
    left = budget - sum(pool.bytes for pool in pools)

    def give(index: int, share: int) -> int:
        """Give slots worth at most `share` bytes; return the bytes given."""
        pool = pools[index]
        more = min(share // pool.slot_bytes.high, pool.experts - slots[index])
        slots[index] += more
        return more * pool.slot_bytes.high

    given = 1
    while given:
        # A pool that is full leaves its share to the others in the next round.
        open_pools = [i for i, pool in enumerate(pools) if slots[i] < pool.experts]
        weight = sum(pools[i].slot_bytes.high * pools[i].experts for i in open_pools)
        shares = [left * pools[i].slot_bytes.high * pools[i].experts // weight for i in open_pools]
        given = sum(give(i, share) for i, share in zip(open_pools, shares, strict=True))
        left -= given
    for index in sorted(range(len(pools)), key=lambda i: -pools[i].slot_bytes.high):
        left -= give(index, left)
    return tuple(replace(pool, slots=n) for pool, n in zip(pools, slots, strict=True))


def _below_cliff(pools: Sequence[Pool]) -> bool:
    return any(pool.slots < pool.token_slots for pool in pools)


def _cliff_budget(pools: Sequence[Pool]) -> int:
    """Return the smallest budget with which `_fill` gives every pool what one token uses."""
    least = [replace(pool, slots=pool.floor) for pool in pools]
    low = sum(replace(pool, slots=pool.token_slots).bytes for pool in pools)
    high = sum(replace(pool, slots=pool.experts).bytes for pool in pools)
    while low < high:
        middle = (low + high) // 2
        if _below_cliff(fill(least, middle)):
            low = middle + 1
        else:
            high = middle
    return low


def _cache_reason(pools: Sequence[Pool]) -> str:
    slots, experts = sum(p.slots for p in pools), sum(p.experts for p in pools)
    if slots == experts:
        return f"all {experts} experts"
    mixed = ", more where they are in low precision" if any(p.low_slots for p in pools) else ""
    return f"{slots} of {experts} experts ({100 * slots / experts:.0f} %){mixed}"


def _too_small(cap: Cap, lines: Sequence[Line]) -> PlanError:
    needed = sum(line.bytes for line in lines)
    split = " + ".join(f"{line.name} {format_size(line.bytes)}" for line in lines if line.bytes)
    # Rounded up, so that the figure works when it is typed back.
    typed = f"{-(-needed >> 20)}M"
    return PlanError(
        f"a memory cap of {format_size(cap.bytes)} ({cap.reason}) is too small: this model needs "
        f"{format_size(needed)} ({split}); the smallest cap that works is --memory {typed}",
        needed,
    )


def _meminfo(root: Path) -> dict[str, int]:
    fields = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            fields[name] = int(number[0]) * 1024
    return fields


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> Iterator[tuple[int, int, str]]:
    """Yield limit, use and name of each limited memory cgroup from the process's own upwards."""
    for mount, base, path, version in _hierarchies(root):
        relative = Path(path)
        # In a container the mount shows a subtree of the hierarchy that paths are given in.
        if relative.is_relative_to(base):
            relative = relative.relative_to(base)
        folder = mount / str(relative).lstrip("/")
        while folder.is_relative_to(mount):
            limit = _limit(folder, version)
            if limit is not None:
                name = f"/{folder.relative_to(mount)}" if folder != mount else "/"
                yield limit, _used(folder, version), name
            folder = folder.parent


def _hierarchies(root: Path) -> Iterator[tuple[Path, str, str, int]]:
    """Yield mount point, mounted subtree, the process's path and version of each hierarchy."""
    paths: dict[int, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, tail = line.partition(" - ")
        base, mount = fields.split()[3:5]
        kind, _, options = tail.split(" ", 2)
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version == 1 and "memory" not in options.split()[-1].split(","):
            continue
        if version in paths:
            yield root / mount.lstrip("/"), base, paths[version], version


def _limit(folder: Path, version: int) -> int | None:
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [int(text) for name in names if (text := _read(folder / name).strip()).isdigit()]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def _used(folder: Path, version: int) -> int:
    """Return what cannot be reclaimed: the page cache that the kernel charges is not in use."""
    current = _read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    prefix = "" if version == 2 else "total_"
    cache = 0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}active_file", f"{prefix}inactive_file"):
            cache += int(value)
    return max(int(current or 0) - cache, 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
