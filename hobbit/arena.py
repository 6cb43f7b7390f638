"""How a device's memory is divided: slots for experts, and room for what is computed at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import PlanError, UsageError
from .layout import ExpertGroup, Layout
from .memory import Line, Pool, SlotBytes, fill
from .sizes import format_size, parse_size

# Of what a device says is free, the rest is for its driver and for others.
_AUTO_SHARE = 0.9
# At most so much is for activations, and at least so much, which is a few tokens' worth.
_BATCH_SHARE = 4
_LEAST_BATCH = 256 << 10
# A stack of matrices is padded at its end.
_STACK_SLACK = 4 << 10


@dataclass(frozen=True)
class DeviceInfo:
    """A device by ggml's name; `shares_memory`: its memory is the machine's own."""

    name: str
    description: str
    shares_memory: bool
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Arena:
    """Slots for experts on a device, in pools of groups whose matrices are alike.

    At most `token_bytes` are copied there for each token that is processed.
    """

    device: DeviceInfo
    pools: tuple[Pool, ...]
    batch_bytes: int
    token_bytes: int
    bytes: int

    @property
    def line(self) -> Line:
        """The arena as a line of the memory plan."""
        slots, experts = (sum(getattr(p, n) for p in self.pools) for n in ("slots", "experts"))
        where = f"{self.device.name} ({self.device.description})"
        whose = "" if self.device.shares_memory else ", in its own memory: not part of the cap"
        reason = f"{where}: {slots} of {experts} experts ({100 * slots / experts:.0f} %){whose}"
        return Line("device", self.bytes, reason)

    def staging(self, layout: Layout) -> int:
        """Bytes here of what goes there and comes back: once, and once more on its way."""
        largest = max(m.expert_bytes for group in layout.groups for m in group.matrices)
        return 2 * self.batch_bytes + largest


def resolve_vram(text: str | int, device: DeviceInfo) -> int:
    """Turn `4G`, a number of bytes or `auto` into bytes of the device's memory."""
    if text != "auto":
        size = parse_size(text) if isinstance(text, str) else text
        if size <= 0:
            raise UsageError(f"vram {text} leaves nothing for experts: write it like 4G, or auto")
        if 0 < device.total_bytes < size:
            total = format_size(device.total_bytes)
            raise PlanError(f"vram {format_size(size)}: device {device.name} has {total}")
        return size
    if device.shares_memory:
        raise UsageError(f"device {device.name} shares the machine's memory: say how much, --vram")
    if device.free_bytes <= 0:
        raise UsageError(f"device {device.name} does not tell how much it has free: use --vram")
    return int(device.free_bytes * _AUTO_SHARE)


def plan_arena(
    layout: Layout, device: DeviceInfo, vram: int, batch_bytes: int, token_bytes: int
) -> Arena:
    """Divide `vram` bytes, or raise PlanError; `batch_bytes` would be best for activations."""
    pools = [_floor(members) for members in _alike(layout.groups)]
    stacks = sum(len(layout.groups[pool.groups[0]].matrices) for pool in pools)
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
    filled = fill(pools, vram - batch - fixed)
    used = sum(pool.bytes for pool in filled) + batch + fixed
    return Arena(device, filled, batch, token_bytes, used)


def _alike(groups: Sequence[ExpertGroup]) -> list[list[ExpertGroup]]:
    """Put groups together whose matrices have the same types and shapes."""
    kinds: dict[tuple[tuple[int, int, int], ...], list[ExpertGroup]] = {}
    for group in groups:
        kind = tuple((matrix.type, matrix.ne0, matrix.ne1) for matrix in group.matrices)
        kinds.setdefault(kind, []).append(group)
    return [*kinds.values()]


def _floor(members: Sequence[ExpertGroup]) -> Pool:
    experts = sum(group.n_expert for group in members)
    size = SlotBytes(members[0].expert_bytes)
    return Pool(size, 1, experts, 1, tuple(group.index for group in members))
