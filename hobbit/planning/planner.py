"""From a model and a cap to what to expect: `hobbit plan` and `hobbit.plan()`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..arena import Arena, DeviceInfo, plan_arena, resolve_vram
from ..attempt import check_graph
from ..cpus import physical_cores
from ..devices import Device, connect
from ..errors import PlanError, UsageError
from ..fingerprint import fingerprint
from ..gguf_file import padded
from ..layout import Layout, LowCopies
from ..memory import Cap, MemoryPlan, resolve_cap, total_memory
from ..memory import plan as divide
from ..offload import Offloaded
from ..quality import EXACT_NAME, Quality, calibrated, choose
from ..rule import ALL_LOW
from ..sizes import format_size, parse_size
from . import history
from .estimate import (
    DeviceCosts,
    Estimate,
    Mix,
    Range,
    There,
    Work,
    estimate,
    hit_rate,
    processor_rate,
    verdict,
    work_of,
)
from .machine import Machine, measured
from .offload import left_here, offloaded
from .parts import Context, batch_bytes, fixed_parts, slot_bytes
from .subject import Subject, subject
from .tiers import costs_of

DEFAULT_CONTEXT = 4096
WONT_FIT = "WON'T FIT"
_MIB, _GIB = 1 << 20, 1 << 30
_TABLE_GIB = (4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Row:
    """One size of memory: what fits, and how fast it is; no estimate where nothing fits."""

    cap_bytes: int
    note: str
    cached_share: float | None
    estimate: Estimate | None

    @property
    def verdict(self) -> str:
        return self.estimate.verdict if self.estimate else WONT_FIT


@dataclass(frozen=True)
class Forecast:
    """A model on a machine, ready to be asked about any cap."""

    subject: Subject
    context: Context
    quality: Quality
    work: Work
    machine: Machine
    runs: tuple[history.Run, ...] = ()
    arena: Arena | None = None
    costs: DeviceCosts | None = None
    n_gpu_layers: int = 0
    offloaded: Offloaded | None = None  # in a device's own memory

    @property
    def there(self) -> There | None:
        """A device's part; None without one."""
        if self.arena is None or self.costs is None:
            return None
        apart, weights = not self.arena.device.shares_memory, sum(self.work.dense.values())
        dense = min(self.offloaded.dense / max(weights, 1), 1.0) if self.offloaded else 0.0
        return There(self.arena.share, self.costs, apart, dense)

    def with_arena(self, arena: Arena, given_gbps: float | None = None) -> Forecast:
        """Return the forecast with a device, whose speed may be given in 10^9 bytes a second."""
        processor = processor_rate(self.work, self.machine.speeds)
        return replace(self, arena=arena, costs=costs_of(arena.device, processor, given_gbps))

    def memory(self, cap: Cap) -> MemoryPlan:
        """Divide a cap as a loaded model would; raise PlanError, with the cap that works.

        UsageError, where the quality keeps its promise only in more.
        """
        plan = self._divided(cap)
        quality = self.quality.at(plan.cached_share)
        keeps = quality.all_low is not None and plan.low_fits and plan.mode == "streamed"
        return plan.with_resident_low() if keeps else plan

    def _divided(self, cap: Cap) -> MemoryPlan:
        """Divide a cap, whatever the quality promises."""
        layout, sizes, arena = self._layout, slot_bytes(self._layout), self.arena
        there = self.offloaded
        shown = arena.line if arena and not arena.device.shares_memory else None

        def within(cap_bytes: int) -> MemoryPlan:
            parts = fixed_parts(layout, self.context, cap_bytes, arena)
            if there is not None:
                parts = left_here(parts, layout, there)
            layers = (there.line,) if there is not None else ()
            return replace(divide(cap, layout, parts, sizes), device=shown, layers=layers)

        try:
            return within(cap.bytes)
        except PlanError as error:
            within(error.needed_bytes)  # the page tables of the cap that the error is to name
            raise

    def expect(self, plan: MemoryPlan) -> Estimate:
        """Say how fast a plan is."""
        return estimate(
            self.work,
            plan,
            self.machine.speeds,
            exponents=history.exponents(self.runs),
            mix=_mix(self.quality, plan, self._layout, history.exponents(self.runs).mid),
            n_ubatch=self.context.n_ubatch,
            there=self.there,
        )

    def row(self, cap_bytes: int, note: str = "") -> Row:
        try:
            plan = self.memory(Cap(cap_bytes, "as asked"))
        except PlanError:
            return Row(cap_bytes, note, None, None)
        except UsageError:
            return Row(cap_bytes, f"{note}: too little for this quality".lstrip(": "), None, None)
        return Row(cap_bytes, note, plan.cached_share, self.expect(plan))

    @property
    def smallest(self) -> int:
        """The smallest cap that works, in whole MiB."""
        size = _MIB
        while True:  # a larger cap needs larger page tables: once more, where that is a MiB
            try:
                self._divided(Cap(size, "as asked"))
                return size
            except PlanError as error:
                size = padded(error.needed_bytes, _MIB)

    @property
    def cliff(self) -> int | None:
        """The cap with which the cache holds what a token uses; None where any does."""
        plan = self._divided(Cap(self.smallest, "as asked"))
        return plan.above_cliff_bytes if plan.below_cliff else None

    @property
    def everything(self) -> int:
        """The smallest cap with which all experts are cached, in whole MiB."""
        smallest = Cap(self.smallest, "as asked")
        plan = self._divided(smallest)
        experts = sum(p.slot_bytes.high * p.experts + p.extra for p in plan.pools)
        needed = plan.cap.bytes - plan.spare_bytes - plan.cache_bytes + experts
        return padded(needed + needed // 200 + 16 * _MIB, _MIB)

    def memory_for(self, tok_s: float) -> Row:
        """Return the least memory that probably gives so many tokens a second.

        Raises PlanError where no amount does.
        """
        low, high = self.smallest, self.everything
        best = self.row(high, "all experts in memory")
        if best.estimate is None or best.estimate.tok_s.mid < tok_s:
            most = best.estimate.tok_s.mid if best.estimate else 0.0
            raise PlanError(
                f"no memory gives {tok_s:g} tok/s here: with everything in memory "
                f"({format_size(high)}) {self.subject.name} makes about {most:.1f}"
            )
        while high - low > _MIB:
            middle = (low + high) // (2 * _MIB) * _MIB
            found = self.row(middle).estimate
            if found is not None and found.tok_s.mid >= tok_s:
                high = middle
            else:
                low = middle
        return self.row(high, f"for {tok_s:g} tok/s")

    @property
    def _layout(self) -> Layout:
        layout = self.subject.layout
        return layout if layout.low else replace(layout, low=self.quality.low)


@dataclass(frozen=True)
class Plan:
    """Whether a model runs under a cap, how fast, and what its memory is for.

    `memory` and `estimate` are None, and `needed_bytes` is the smallest cap that works, where it
    does not fit; `reason` says why in a sentence.
    """

    forecast: Forecast
    cap: Cap
    memory: MemoryPlan | None
    estimate: Estimate | None
    reason: str
    needed_bytes: int
    rows: tuple[Row, ...]
    wanted: Row | None = None

    @property
    def fits(self) -> bool:
        return self.memory is not None

    @property
    def tok_s(self) -> tuple[float, float]:
        """Tokens a second, from and to; zeros where it does not fit."""
        return (self.estimate.tok_s.low, self.estimate.tok_s.high) if self.estimate else (0.0, 0.0)

    @property
    def limit(self) -> str:
        """What the speed is limited by: disk, compute, or memory where it does not fit."""
        return self.estimate.limit if self.estimate else "memory"

    @property
    def verdict(self) -> str:
        return verdict(self.estimate.tok_s.mid) if self.estimate else WONT_FIT

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        forecast = self.forecast
        speeds = forecast.machine.speeds
        return {
            "schema": "hobbit.plan/1",
            "model": forecast.subject.name,
            "estimated_header": forecast.subject.estimated,
            "quality": forecast.quality.name,
            "n_expert_used": forecast.subject.layout.n_expert_used,
            "fits": self.fits,
            "verdict": self.verdict,
            "reason": self.reason,
            "needed_bytes": self.needed_bytes,
            "limit": self.limit,
            "tok_s": list(self.tok_s),
            "estimate": _estimate_dict(self.estimate),
            "memory": self.memory.to_dict() if self.memory else None,
            "token_bytes": forecast.work.token_bytes,
            "dense_bytes_a_token": sum(forecast.work.dense.values()),
            "table": [_row_dict(row) for row in self.rows],
            "for": _row_dict(self.wanted) if self.wanted else None,
            "machine": {
                "threads": forecast.machine.n_threads,
                "read_bytes_s": speeds.read if forecast.work.pieces else None,
                "io": forecast.machine.io,
                "decode_bytes_s": {str(kind): rate for kind, rate in speeds.decode.items()},
                "prompt_bytes_s": {str(kind): rate for kind, rate in speeds.prompt.items()},
            },
            "device": _device_dict(forecast),
            "context": asdict(forecast.context),
            "runs": [asdict(run) | {"error": run.error} for run in forecast.runs],
        }


def _estimate_dict(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    ranges = {name: value._asdict() for name, value in vars(found).items() if type(value) is Range}
    return vars(found) | ranges | {"verdict": found.verdict}


def _device_dict(forecast: Forecast) -> dict[str, Any] | None:
    if forecast.arena is None or forecast.costs is None:
        return None
    return forecast.arena.to_dict() | {"costs": asdict(forecast.costs)}


def _row_dict(row: Row) -> dict[str, Any]:
    return vars(row) | {"estimate": _estimate_dict(row.estimate), "verdict": row.verdict}


def plan(
    model: str | Path | None = None,
    memory: str | int = "auto",
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    quality: str | float = EXACT_NAME,
    n_expert_used: int | None = None,
    read_gbps: float | None = None,
    type_k: int = 1,
    type_v: int = 1,
    n_ubatch: int = 512,
    for_tok_s: float | None = None,
    remeasure: bool = False,
    device: str | None = None,
    vram: str | int = "auto",
    rpc: str | None = None,
    device_gbps: float | None = None,
    n_gpu_layers: int = 0,
) -> Plan:
    """Say whether a model runs here and how fast, without loading it.

    `memory` is a cap as in `hobbit.Llama`, but one above what this machine has is taken as it is:
    the question may be about another. `read_gbps` is the disk's speed in 10^9 bytes a second, in
    place of a measurement. The first plan on a machine measures for about a second for each type of
    weights, and one for the disk. `device`, `vram` and `rpc` are as in `hobbit.Llama`; `vram`
    alone is the memory of a graphics card that is not here. `device_gbps` is how fast a device
    multiplies, in 10^9 bytes of weights a second, in place of what runs with it measured, or else
    an assumption. `n_gpu_layers` of llama.cpp's layers (-1: all) go to that device too; what they
    take there is estimated. `n_expert_used` is as in `hobbit.Llama`. Raises UsageError where no
    device is named for them, and ModelError for a model that cannot be read or run.
    """
    found = subject(str(model) if model is not None else None, n_expert_used)
    if found.path is not None:
        check_graph(found.layout, {})
    cap = cap_of(memory)
    forecast = forecast_of(
        found,
        context_of(found.layout, n_ctx, n_ubatch, type_k, type_v),
        choose(found.layout, quality),
        n_threads or physical_cores(),
        read_gbps=read_gbps,
        remeasure=remeasure,
    )
    info = _device_info(device, vram, rpc)
    if info is None and n_gpu_layers != 0:
        raise UsageError("-ngl: layers of which device? Name it, --device or --rpc, or say --vram")
    if info is not None and found.layout.groups:
        forecast = _with_layers(forecast, info, n_gpu_layers)
        taken = forecast.offloaded.bytes if forecast.offloaded else 0
        batch = batch_bytes(found.layout, forecast.context.n_ubatch)
        # Of a card that is not here it is all that there is.
        of_card = vram if device or rpc else _left_of_card(info, taken)
        arena = plan_arena(found.layout, info, resolve_vram(of_card, info, taken), batch, 0)
        forecast = forecast.with_arena(arena, device_gbps)
    wanted = None if for_tok_s is None else forecast.memory_for(for_tok_s)
    rows = partial(_table, forecast, cap, wanted)
    try:
        divided = forecast.memory(cap)
    except PlanError as error:
        return Plan(forecast, cap, None, None, str(error), error.needed_bytes, rows(None), wanted)
    expected = forecast.expect(divided)
    smallest = forecast.smallest
    return Plan(forecast, cap, divided, expected, "it fits", smallest, rows(divided), wanted)


def _device_info(device: str | None, vram: str | int, rpc: str | None) -> DeviceInfo | None:
    """Return the device that is asked about: one that is here, or one with so much memory."""
    name = connect(rpc) if rpc else None
    name = device or name
    if name is not None:
        with closing(Device(name)) as opened:
            return opened.info
    if vram in ("auto", "0", 0):
        return None
    size = parse_size(vram) if isinstance(vram, str) else vram
    return DeviceInfo("GPU", "one that is not here", False, size, size)


def _left_of_card(card: DeviceInfo, taken: int) -> int:
    if card.total_bytes <= taken:
        sizes = f"{format_size(card.total_bytes)}: {format_size(taken)} of it for layers (-ngl)"
        raise PlanError(
            f"vram {sizes}, which leaves nothing for experts: give more, or fewer layers"
        )
    return card.total_bytes - taken


def _with_layers(forecast: Forecast, device: DeviceInfo, n_gpu_layers: int) -> Forecast:
    """Return the forecast with layers on the device; where memory is shared they take the same."""
    if n_gpu_layers == 0 or device.shares_memory:
        return replace(forecast, n_gpu_layers=n_gpu_layers)
    layout, context = forecast.subject.layout, forecast.context
    there = offloaded(layout, context, n_gpu_layers, device.name)
    return replace(forecast, n_gpu_layers=n_gpu_layers, offloaded=there)


def forecast_of(
    found: Subject,
    context: Context,
    quality: Quality,
    n_threads: int,
    *,
    read_gbps: float | None = None,
    remeasure: bool = False,
) -> Forecast:
    """Measure what is not known of the machine yet."""
    work = work_of(_with_low(found.layout, quality))
    read = None if read_gbps is None else read_gbps * 1e9
    machine = measured(found.layout, work, n_threads, path=found.path, read=read, again=remeasure)
    assert machine is not None  # it is None only where nothing may be measured
    runs = tuple(history.runs_of(fingerprint(found.layout.gguf))) if found.path else ()
    return Forecast(found, context, quality, work, machine, runs)


def known_forecast(
    found: Subject, context: Context, quality: Quality, n_threads: int, model: str
) -> Forecast | None:
    """Return the forecast if nothing has to be measured for it; `model` is the fingerprint."""
    work = work_of(_with_low(found.layout, quality))
    machine = measured(found.layout, work, n_threads, path=found.path, only_known=True)
    if machine is None:
        return None
    return Forecast(found, context, quality, work, machine, tuple(history.runs_of(model)))


def context_of(
    layout: Layout, n_ctx: int | None, n_ubatch: int, type_k: int, type_v: int
) -> Context:
    """Return the context that `hobbit run` would make of these flags."""
    trained = layout.gguf.get(f"{layout.gguf.arch}.context_length", 0)
    trained = trained if isinstance(trained, int) else 0
    if n_ctx is None:
        n_ctx = min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT)
    n_ctx = padded(n_ctx or trained or DEFAULT_CONTEXT, 256)
    # llama.cpp needs flash attention for a quantised V cache.
    flash = type_v not in (0, 1, 30)
    return Context(n_ctx, min(n_ubatch, n_ctx), type_k, type_v, flash)


def cap_of(memory: str | int) -> Cap:
    """Read a cap; unlike for a run, one above this machine's memory stays what it is."""
    if isinstance(memory, str) and (memory == "auto" or memory.strip().endswith("%")):
        return resolve_cap(memory)
    size = parse_size(memory) if isinstance(memory, str) else memory
    total, what = total_memory()
    if size <= total:
        return resolve_cap(memory)
    return Cap(size, f"as asked; {what} is {format_size(total)}")


def _with_low(layout: Layout, quality: Quality) -> Layout:
    return layout if layout.low else replace(layout, low=quality.low)


def _mix(quality: Quality, plan: MemoryPlan, layout: Layout, exponent: float) -> Mix:
    """Return what a quality reads and computes of what exact does.

    Where all are low, the cache holds as many more as they are smaller. Otherwise calibration has
    measured what is read, with half of the experts cached: less or more room changes it little.
    """
    chosen = quality.at(plan.cached_share)
    if chosen.low is None or plan.mode == "resident-experts":
        return Mix()
    smaller = _low_share(layout, chosen.low)
    if plan.low_is_resident:  # a loaded model's rule is exact then: what is cached high is used
        high = sum(max(pool.beside_low, 0) for pool in plan.pools)
        share = hit_rate(high / sum(pool.experts for pool in plan.pools), exponent)
        return Mix(share, 1 - share, smaller, math.inf)
    if chosen.rule == ALL_LOW:
        return Mix(0.0, 1.0, smaller, 1 / smaller)
    if chosen.rule.is_exact or chosen.point is None:
        return Mix()  # thresholds given by hand: what they save was not measured
    known = calibrated(layout, chosen.low)
    read = chosen.point.bytes_per_token / max(known.exact.bytes_per_token, 1.0)
    return Mix(chosen.point.high, chosen.point.low, min(read, 1.0))


def _low_share(layout: Layout, low: LowCopies) -> float:
    """Return the bytes of all low copies, of all high ones."""
    high = sum(group.expert_bytes * group.n_expert for group in layout.groups)
    return sum(group.expert_bytes * group.n_expert for group in low.groups) / high


def _table(
    forecast: Forecast, cap: Cap, wanted: Row | None, plan: MemoryPlan | None
) -> tuple[Row, ...]:
    """Return rows by rising memory: round sizes, and those that mean something for this model."""
    sizes = dict(_sizes(forecast, cap, plan))
    if wanted is not None:
        sizes[wanted.cap_bytes] = wanted.note
    return tuple(forecast.row(size, note) for size, note in sorted(sizes.items()))


def _sizes(forecast: Forecast, cap: Cap, plan: MemoryPlan | None) -> Iterator[tuple[int, str]]:
    for gib in _TABLE_GIB:
        yield gib * _GIB, ""
    yield forecast.smallest, "smallest"
    if (cliff := forecast.cliff) is not None:
        yield cliff, "a token's experts"
    yield forecast.everything, "everything"
    yield cap.bytes, "this cap" if plan is not None else "this cap: too small"
