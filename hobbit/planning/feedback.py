"""What a run tells of its prediction, and leaves behind for `hobbit why`.

Nothing here ever fails a run: what cannot be read or written is left out.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..cpus import physical_cores
from ..errors import HobbitError
from ..folders import recall, remember, state_folder
from ..low_file import find_low
from ..memory import total_memory
from ..quality import calibrated, low_copies
from . import history
from .estimate import Estimate, cached_share
from .parts import Context
from .planner import Forecast, known_forecast
from .subject import Subject
from .tiers import learn

if TYPE_CHECKING:
    from ..llama import Llama
    from ..stats import Stats

LAST_RUN = "last-run.json"
SCHEMA = "hobbit.last-run/1"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Outcome(Protocol):
    """What came of a run: the counters of all of it, and of what came after the first token."""

    @property
    def stats(self) -> Stats: ...
    @property
    def decode(self) -> Stats: ...


@dataclass(frozen=True)
class Expected:
    """What is expected of a loaded model; `model` is its fingerprint."""

    model: str
    forecast: Forecast
    estimate: Estimate


def expected(llm: Llama) -> Expected | None:
    """Predict a loaded model's speed, if that needs no measurement: see `hobbit plan`."""
    with suppress(HobbitError):
        layout, params = llm.layout, llm.context_params
        found = Subject(layout.gguf.parts[0].path.name, layout, layout.gguf.parts[0].path)
        context = Context(llm.n_ctx(), params.n_ubatch, params.type_k, params.type_v)
        forecast = known_forecast(found, context, llm.quality, llm.n_threads, llm.fingerprint)
        if forecast is not None:
            forecast = _with_device(forecast, llm)
            return Expected(llm.fingerprint, forecast, forecast.expect(llm.plan))
    return None


def _with_device(forecast: Forecast, llm: Llama) -> Forecast:
    """Return the forecast with what the model has on a device that computes experts."""
    if llm.arena is None:
        return forecast
    layers = [part for part in llm.offloaded if part.device == llm.arena.device.name]
    return replace(forecast.with_arena(llm.arena), offloaded=layers[0] if layers else None)


def expected_line(found: Expected) -> str:
    """Say it before the run."""
    low, _, high = found.estimate.tok_s
    first = found.estimate.first_token_s
    return (
        f"expect {low:.1f}-{high:.1f} tok/s, first token ~{first.mid:.1f} s per 200 prompt tokens"
    )


def finished(llm: Llama, name: str, result: Outcome, found: Expected | None) -> str:
    """Keep what the run was like; say so in a few words if it was not what was predicted."""
    run = _run(llm, result, found) if found else None
    record = _record(llm, name, result, found)
    with suppress(HobbitError):
        if llm.arena is not None and result.decode.device_pairs:
            decode, size = result.decode, _pair_bytes(llm)
            learn(llm.arena.device, size, decode.device_pairs, decode.device_s)
        remember(LAST_RUN, record, state_folder)
        # With another number of experts the hits are others.
        if run is not None and found is not None and not llm.layout.other_number:
            history.keep(found.model, run)
    if run is None or not run.is_missed:
        return ""
    where = "below" if run.error < 0 else "above"
    return f"predicted {run.predicted_low:.1f}-{run.predicted_high:.1f}: {where}, see hobbit why"


def last_run() -> dict[str, Any]:
    """Return what the last run left; nothing where it left nothing that can be read."""
    found = recall(LAST_RUN, state_folder)
    return found if found.get("schema") == SCHEMA else {}


def _run(llm: Llama, result: Outcome, found: Expected) -> history.Run | None:
    decode, token_bytes = _decode(result), found.forecast.work.token_bytes
    if decode.tokens_generated < history.MIN_TOKENS or decode.tok_s <= 0:
        return None
    # What only filled the cache is read once, however long a run is.
    lasting = min(decode.evictions / decode.misses, 1.0) if decode.misses else 1.0
    read = lasting * decode.read_bytes / decode.tokens_generated
    hit = 1 - read / token_bytes if token_bytes else 1.0
    return history.Run(
        *found.estimate.tok_s,
        measured=decode.tok_s,
        share=cached_share(llm.plan, found.forecast.there),
        hit=min(max(hit, 0.0), 1.0),
        exact=llm.rule.is_exact and decode is result.decode,
    )


def _pair_bytes(llm: Llama) -> float:
    """Return the bytes of an expert, in the mean."""
    return llm.layout.expert_bytes / sum(group.n_expert for group in llm.layout.groups)


def _decode(result: Outcome) -> Stats:
    """Return what came after the first token: the whole run where its text came at the end."""
    return result.decode if result.decode.tokens_generated else result.stats


def _record(llm: Llama, name: str, result: Outcome, found: Expected | None) -> dict[str, Any]:
    experts = sum(pool.slot_bytes.high * pool.experts for pool in llm.plan.pools)
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": name,
        "quality": llm.quality.name,
        "exact": llm.rule.is_exact and not llm.layout.other_number,
        "lossy_read": _lossy_read(llm),
        "threads": llm.n_threads,
        "cores": physical_cores(),
        "n_ubatch": llm.context_params.n_ubatch,
        "machine_bytes": total_memory()[0],
        "token_bytes": llm.plan.token_bytes,
        "cached_share": llm.plan.cached_share,
        "expert_bytes": experts,
        "plan": llm.plan.to_dict(),
        "run": result.stats.to_dict(),
        "decode": _decode(result).to_dict(),
        "device": llm.arena.to_dict() if llm.arena else None,
        "dispatch": llm.dispatch,
        "predicted": asdict(found.estimate) if found else None,
        "swapped_bytes": _swapped_bytes(),
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        "huge_pages": _huge_pages(),
        "load": os.getloadavg()[0],
    }


def _lossy_read(llm: Llama) -> dict[str, float] | None:
    """Return the bytes that each calibrated mode reads, of exact's; None if not prepared."""
    layout = llm.layout
    if not layout.groups or (layout.low is None and find_low(layout.gguf, llm.fingerprint) is None):
        return None
    with suppress(HobbitError):
        known = calibrated(layout, layout.low or low_copies(layout))
        whole = max(known.exact.bytes_per_token, 1.0)
        return {
            mode: point.bytes_per_token / whole
            for mode, point in known.modes().items()
            if point is not None
        }
    return None


def _swapped_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmSwap:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0


def _huge_pages() -> str:
    """Return the system's setting: always, madvise or never; empty where there is none."""
    try:
        return _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""
