"""How long a token takes: arithmetic on bytes and speeds, nothing else.

A token's dense weights and active experts go through the processor (compute), its missed experts
through the disk. The two overlap, but not wholly: measured, the time is close to the root of the
sum of their squares. A device computes the experts that it holds while the processor computes the
others: what takes longer counts. `docs/plan.md` has the measurements behind every constant here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..gguf_file import Tensor
from ..layout import ExpertGroup, Layout
from ..memory import MemoryPlan

# Attention, norms, the router and waiting for the slower thread, on top of the large matrices.
DECODE_OVERHEAD, PROMPT_OVERHEAD = 1.10, 1.65
# How far compute is off in either direction.
COMPUTE_SPREAD = 0.08
# Weights of which a token needs one row.
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")
FIRST_TOKENS = 200
_VERDICTS = ((15.0, "FAST"), (8.0, "GOOD"), (3.0, "USABLE"), (0.0, "SLOW"))

Limit = Literal["disk", "compute", "device"]


class Range(NamedTuple):
    """From the least to the most that is expected, and what is likeliest."""

    low: float
    mid: float
    high: float


# With a share s of the experts cached, misses are (1 - s)^a; chosen uniformly at random, a would be
# 1. It is a model's own, nearly the same at every cap, and no header tells it: so the middle is as
# many times the least that was measured as it is below the most that is assumed.
EXPONENTS = Range(1.75, math.sqrt(1.75 * 3.6), 3.6)


@dataclass(frozen=True)
class Work:
    """What tokens need, in bytes by ggml type.

    `dense`, and `experts` and `low` in their two precisions, are multiplied for each token.
    `pieces` are expert bytes to read, one pair (all of a group, share of it used) a group.
    """

    dense: Mapping[int, int]
    experts: Mapping[int, int]
    low: Mapping[int, int]
    pieces: tuple[tuple[int, float], ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts that a token uses, in the high precision."""
        return round(sum(total * used for total, used in self.pieces))

    def bytes_of(self) -> Counter[int]:
        """Return everything that a token is multiplied with, by type."""
        return Counter(self.dense) + Counter(self.experts) + Counter(self.low)


@dataclass(frozen=True)
class Speeds:
    """Bytes a second: of weights by ggml type, for one token and for many at once; of the disk."""

    decode: Mapping[int, float]
    prompt: Mapping[int, float]
    read: float


@dataclass(frozen=True)
class DeviceCosts:
    """What a device takes: bytes of weights a second, and seconds for each layer besides.

    A measured rate has the latter in it.
    """

    bytes_s: float
    batch_s: float
    source: Literal["given", "measured", "assumed"]


@dataclass(frozen=True)
class There:
    """What a device holds, as a share of all experts, and what it takes.

    `dense` is its share of the dense weights. Unless it is `apart`, it reads the memory that the
    processor reads: what one of them gets of the memory's speed the other does not.
    """

    share: float
    costs: DeviceCosts
    apart: bool = True
    dense: float = 0.0

    def hits(self, share: float, exponent: float) -> Range:
        """Return the hits on the device where `share` of the experts is cached, here or there.

        At the least it holds of the experts in use what it holds of all that are cached, at the
        most those that are used most.
        """
        if share <= 0:
            return Range(0.0, 0.0, 0.0)
        even = hit_rate(share, exponent) * min(self.share / share, 1.0)
        best = max(hit_rate(self.share, exponent), even)
        return Range(even, (even + best) / 2, best)


@dataclass(frozen=True)
class Mix:
    """What a quality makes of exact: shares of the pairs by precision, and of the bytes read.

    `read` is what the same number of misses reads, of exact's; `room` how many times as many copies
    the cache holds.
    """

    high: float = 1.0
    low: float = 0.0
    read: float = 1.0
    room: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """What to expect of one plan; `hit` and `tok_s` as ranges, times of the likeliest."""

    tok_s: Range
    hit: Range
    compute_s: float
    disk_s: float
    first_token_s: Range
    limit: Limit
    missed_bytes: int = field(default=0)
    device_hit: Range | None = None
    device_s: float = 0.0

    @property
    def verdict(self) -> str:
        return verdict(self.tok_s.mid)


def verdict(tok_s: float) -> str:
    """Say a speed in one word."""
    return next(word for least, word in _VERDICTS if tok_s >= least)


def work_of(layout: Layout) -> Work:
    """Add up what a token needs of a model."""
    tensors, streamed = layout.gguf.tensors, layout.streamed
    tied = "output.weight" not in tensors
    dense: Counter[int] = Counter()
    for tensor in tensors.values():
        if tensor.name not in streamed and (tied or not _is_looked_up(tensor)):
            dense[tensor.type] += tensor.nbytes
    low = layout.low.groups if layout.low else ()
    return Work(
        dense,
        _active(layout.groups, layout.n_expert_used),
        _active(low, layout.n_expert_used),
        tuple(
            (
                sum(m.file_bytes for m in group.matrices) * group.n_expert,
                min(layout.n_expert_used / group.n_expert, 1.0),
            )
            for group in layout.groups
        ),
    )


def _is_looked_up(tensor: Tensor) -> bool:
    return tensor.name in _LOOKED_UP


def _active(groups: tuple[ExpertGroup, ...], used: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for group in groups:
        for matrix in group.matrices:
            found[matrix.type] += matrix.expert_bytes * min(used, group.n_expert)
    return found


def hit_rate(share: float, exponent: float) -> float:
    """Return the hits to expect where this share of the experts is cached."""
    return 1.0 if share >= 1 else 1 - (1 - share) ** exponent


def exponent_of(share: float, hit: float) -> float | None:
    """Return the exponent that a run had; None where it tells nothing."""
    if not (0.02 < share < 0.98 and 0.01 < hit < 0.999):
        return None
    return math.log(1 - hit) / math.log(1 - share)


def together(compute_s: float, disk_s: float) -> float:
    """Return the time of computing and reading that overlap as far as they do."""
    return math.hypot(compute_s, disk_s)


def estimate(
    work: Work,
    plan: MemoryPlan,
    speeds: Speeds,
    *,
    exponents: Range = EXPONENTS,
    mix: Mix | None = None,
    n_ubatch: int = 512,
    there: There | None = None,
) -> Estimate:
    """Return what a plan comes to at these speeds; `there` is a device's part of it."""
    mix = mix or Mix()
    share = min(cached_share(plan, there) * mix.room, 1.0)
    hits = [hit_rate(share, exponent) for exponent in exponents]
    if plan.below_cliff and mix.room == 1.0:
        hits[0] = 0.0  # where the least recently used expert goes, nothing is there
    on_device = there.hits(share, exponents.mid) if there else Range(0.0, 0.0, 0.0)
    computed = [_computed(work, mix, speeds, there, hit) for hit in on_device]
    compute_s, device_s = computed[1]
    busy = [max(each) for each in computed]
    read = work.token_bytes * mix.read
    disk = [read * (1 - hit) / speeds.read for hit in hits]
    slow, fast = 1 + COMPUTE_SPREAD, 1 - COMPUTE_SPREAD
    # A device that is slower than the processor makes more hits on it the worse.
    times = [
        together(seconds, read_s)
        for seconds, read_s in zip((max(busy) * slow, busy[1], min(busy) * fast), disk, strict=True)
    ]
    first = _first_token(work, plan, speeds, mix, n_ubatch, share)
    computing: Limit = "device" if device_s > compute_s else "compute"
    return Estimate(
        tok_s=Range(*(1 / time for time in times)),
        hit=Range(*hits),
        compute_s=compute_s,
        disk_s=disk[1],
        first_token_s=Range(*(seconds + times[1] for seconds in first)),
        limit="disk" if disk[1] > busy[1] else computing,
        missed_bytes=round(read * (1 - hits[1])),
        device_hit=on_device if there else None,
        device_s=device_s,
    )


def cached_share(plan: MemoryPlan, there: There | None) -> float:
    """Return the share of all experts that has a place, here or on a device."""
    return min(plan.cached_share + (there.share if there else 0.0), 1.0)


def _computed(
    work: Work, mix: Mix, speeds: Speeds, there: There | None, hit: float
) -> tuple[float, float]:
    """Return the seconds in which the processor is busy with a token, and those of the device.

    The dense weights come before and after the experts of each layer, whoever computes them.
    """
    here = DECODE_OVERHEAD * _seconds(_mixed(work, mix, hit), speeds.decode)
    if there is None:
        return here, 0.0
    dense = DECODE_OVERHEAD * _seconds(_mixed(work, Mix(0.0)), speeds.decode)
    layers = there.dense * sum(work.dense.values()) / there.costs.bytes_s
    gained = there.dense * dense - layers
    here, dense = here - gained, dense - gained
    if hit <= 0:
        return here, 0.0
    bytes_there = hit * mix.high * sum(work.experts.values())
    device = bytes_there / there.costs.bytes_s + len(work.pieces) * there.costs.batch_s
    return (here, dense + device) if there.apart else (here + device, 0.0)


def processor_rate(work: Work, speeds: Speeds) -> float:
    """Return how many bytes of this model's experts the processor multiplies with in a second."""
    return sum(work.experts.values()) / _seconds({**work.experts}, speeds.decode)


def _mixed(work: Work, mix: Mix, elsewhere: float = 0.0) -> dict[int, float]:
    """Return bytes by type to multiply with here; high copies `elsewhere`, as a share, are not."""
    found: dict[int, float] = {kind: float(size) for kind, size in work.dense.items()}
    high = mix.high * (1 - elsewhere)
    for share, of in ((high, work.experts), (mix.low, work.low)):
        for kind, size in of.items():
            found[kind] = found.get(kind, 0.0) + share * size
    return found


def _seconds(sizes: Mapping[int, float], speeds: Mapping[int, float]) -> float:
    """A type whose speed is not known is taken for the slowest."""
    slowest = min(speeds.values())
    return sum(size / speeds.get(kind, slowest) for kind, size in sizes.items())


def _first_token(
    work: Work, plan: MemoryPlan, speeds: Speeds, mix: Mix, n_ubatch: int, share: float
) -> list[float]:
    """Return the seconds of a prompt: with the cache as full as it gets, as usual, and empty.

    What a device computes of it is not counted as a gain. Where some pairs are high, an expert of a
    ubatch is: it gets the strongest need of its tokens.
    """
    mix = Mix() if mix.high and not plan.low_is_resident else mix
    weights = _mixed(work, mix)
    compute = FIRST_TOKENS * PROMPT_OVERHEAD * _seconds(weights, speeds.prompt)
    ubatches = math.ceil(FIRST_TOKENS / n_ubatch)
    tokens = min(FIRST_TOKENS, n_ubatch)
    touched = mix.read * sum(total * (1 - (1 - used) ** tokens) for total, used in work.pieces)
    absent = 1 - share
    warm = together(compute, ubatches * touched * absent / speeds.read)
    cold = together(compute, touched * (1 + (ubatches - 1) * absent) / speeds.read)
    return [min(compute, warm), warm, cold]
