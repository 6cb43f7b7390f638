"""How a device's memory is divided: slots for experts, and room for what is computed at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import PlanError, UsageError
from .layout import ExpertGroup, Layout
from .memory import Line, SlotBytes
from .mix import ALL_HIGH, Mix
from .sizes import format_size, parse_size

# Who may compute an expert, where there is a device.
DISPATCHES = ("auto", "device", "cpu", "split")
# Of what a device says is free, the rest is for its driver and for others.
_AUTO_SHARE = 0.9
# At most so much is for activations, and at least so much, which is a few tokens' worth.
_BATCH_SHARE = 4
_LEAST_BATCH = 256 << 10
# A stack of matrices is padded at its end.
_STACK_SLACK = 4 << 10
# In how many steps the slots grow from none to all experts.
_STEPS = 1 << 24


@dataclass(frozen=True)
class DeviceInfo:
    """A device by ggml's name; `shares_memory`: its memory is the machine's own."""

    name: str
    description: str
    shares_memory: bool
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class DevicePool:
    """Slots for the high and the low copies of groups (by index) whose matrices are alike."""

    expert_bytes: SlotBytes
    experts: int
    groups: tuple[int, ...]
    slots: int = 1
    low_slots: int = 0

    @property
    def bytes(self) -> int:
        high, low = self.expert_bytes
        return high * self.slots + low * self.low_slots

    def at(self, mix: Mix, total: float) -> DevicePool:
        """Return it with so many slots, as far as there are experts for them; one at least."""
        slots = min(max(_whole(total * (1 - mix.low)), 1), self.experts)
        low_slots = min(_whole(total * mix.low), self._low_limit(mix, slots))
        return replace(self, slots=slots, low_slots=low_slots)

    def with_more(self, mix: Mix, budget: int) -> DevicePool:
        """Return it with what slots of either kind so many bytes allow besides."""
        high, low = self.expert_bytes
        taken = 0 if mix.beside else self.low_slots
        more = min(budget // high, self.experts - taken - self.slots)
        slots, left = self.slots + more, budget - more * high
        limit = self._low_limit(mix, slots) - self.low_slots
        more = min(left // low, limit) if limit > 0 else 0
        return replace(self, slots=slots, low_slots=self.low_slots + more)

    def _low_limit(self, mix: Mix, slots: int) -> int:
        if mix.low <= 0 or not self.expert_bytes.low:
            return 0
        return self.experts - (0 if mix.beside else slots)


@dataclass(frozen=True)
class Arena:
    """Slots for experts on a device, in pools of groups whose matrices are alike.

    At most `token_bytes` are copied there for each token that is processed.
    """

    device: DeviceInfo
    pools: tuple[DevicePool, ...]
    batch_bytes: int
    token_bytes: int
    bytes: int

    @property
    def line(self) -> Line:
        """The arena as a line of the memory plan."""
        low = sum(pool.low_slots for pool in self.pools)
        where = f"{self.device.name} ({self.device.description})"
        more = f" and {low} in low precision" if low else ""
        whose = "" if self.device.shares_memory else ", in its own memory: not part of the cap"
        share = f"{self.slots} of {self.experts} experts ({100 * self.share:.0f} %)"
        reason = f"{where}: {share}{more}{whose}"
        return Line("device", self.bytes, reason)

    @property
    def slots(self) -> int:
        return sum(pool.slots for pool in self.pools)

    @property
    def experts(self) -> int:
        return sum(pool.experts for pool in self.pools)

    @property
    def share(self) -> float:
        """The share of all experts that has a slot there."""
        return self.slots / self.experts

    def to_dict(self) -> dict[str, Any]:
        """Return the arena as plain data."""
        return {
            **asdict(self.device),
            "bytes": self.bytes,
            "slots": self.slots,
            "share": self.share,
            "batch_bytes": self.batch_bytes,
        }

    def staging(self, layout: Layout) -> int:
        """Bytes here of what goes there and comes back: once, and once more on its way."""
        largest = max(m.expert_bytes for group in layout.groups for m in group.matrices)
        return 2 * self.batch_bytes + largest


def resolve_vram(text: str | int, device: DeviceInfo, taken: int = 0) -> int:
    """Turn `4G`, a number of bytes or `auto` into bytes of the device's memory.

    `taken` bytes of it are for llama.cpp's own layers, which are not there yet.
    """
    name, layers = device.name, f", {format_size(taken)} of it for layers (-ngl)" if taken else ""
    if text != "auto":
        size = parse_size(text) if isinstance(text, str) else text
        if size <= 0:
            raise UsageError(f"vram {text} leaves nothing for experts: write it like 4G, or auto")
        if 0 < device.total_bytes < size + taken:
            total = format_size(device.total_bytes)
            raise PlanError(f"vram {format_size(size)}: device {name} has {total}{layers}")
        return size
    if device.shares_memory:
        raise UsageError(f"device {name} shares the machine's memory: say how much, --vram")
    if device.free_bytes <= 0:
        raise UsageError(f"device {name} does not tell how much it has free: use --vram")
    size = int(device.free_bytes * _AUTO_SHARE) - taken
    if size <= 0:
        free = format_size(device.free_bytes)
        raise PlanError(f"device {name} has {free} free{layers}: nothing is left for experts")
    return size


def plan_arena(
    layout: Layout,
    device: DeviceInfo,
    vram: int,
    batch_bytes: int,
    token_bytes: int,
    mix: Mix = ALL_HIGH,
) -> Arena:
    """Divide `vram` bytes, or raise PlanError; `batch_bytes` would be best for activations."""
    copies = [layout.groups, layout.low.groups] if layout.low and mix.low > 0 else [layout.groups]
    pools = _floor(copies)
    stacks = sum(len(groups[pool.groups[0]].matrices) for pool in pools for groups in copies)
    fixed = stacks * _STACK_SLACK
    least = fixed + sum(pool.bytes for pool in pools)
    batch = min(batch_bytes, max(vram // _BATCH_SHARE, _LEAST_BATCH))
    if vram < least + batch:
        needed = least + min(batch_bytes, max(least // (_BATCH_SHARE - 1) + 1, _LEAST_BATCH))
        raise PlanError(
            f"vram {format_size(vram)} is too small for one expert of each kind: "
            f"the smallest that works is --vram {-(-needed >> 20)}M",
            needed,
        )
    filled = _fill(pools, mix, vram - batch - fixed)
    used = sum(pool.bytes for pool in filled) + batch + fixed
    return Arena(device, filled, batch, token_bytes, used)


def _whole(value: float) -> int:
    """Round down, but for what a product of fractions is below a whole number."""
    return int(value + 1e-6)


def _floor(copies: Sequence[Sequence[ExpertGroup]]) -> list[DevicePool]:
    """Make a pool of the groups whose matrices have the same types and shapes, in all copies."""
    kinds: dict[tuple[tuple[int, int, int], ...], list[int]] = defaultdict(list)
    for members in zip(*copies, strict=True):
        matrices = (matrix for group in members for matrix in group.matrices)
        kinds[tuple((m.type, m.ne0, m.ne1) for m in matrices)].append(members[0].index)
    pools = []
    for indices in kinds.values():
        size = SlotBytes(*(groups[indices[0]].expert_bytes for groups in copies))
        experts = sum(copies[0][index].n_expert for index in indices)
        pools.append(DevicePool(size, experts, tuple(indices)))
    return pools


def _fill(pools: Sequence[DevicePool], mix: Mix, budget: int) -> tuple[DevicePool, ...]:
    """Give all pools slots for the same share of their experts, and then what is left."""
    shares = (1 - mix.low, mix.low) if mix.beside else (1 - mix.low,)
    rarer = min(share for share in shares if share > 0)  # when there are slots for all, it ends

    def at(step: int) -> list[DevicePool]:
        return [pool.at(mix, pool.experts * step / _STEPS / rarer) for pool in pools]

    least, most = 0, _STEPS
    while least < most:
        middle = (least + most + 1) // 2
        if sum(pool.bytes for pool in at(middle)) <= budget:
            least = middle
        else:
            most = middle - 1
    filled = at(least)
    left = budget - sum(pool.bytes for pool in filled)
    for index in sorted(range(len(filled)), key=lambda i: -filled[i].expert_bytes.high):
        before = filled[index]
        filled[index] = before.with_more(mix, left)
        left -= filled[index].bytes - before.bytes
    return tuple(filled)
