"""Why the last run was as fast as it was: where its time went, and what would change that.

Arithmetic on what the run left behind. A gain is what the plan's model makes of this run's own
times, so it starts from what was measured and not from what was predicted.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..sizes import format_size
from .estimate import EXPONENTS, exponent_of, hit_rate

# What other programs should be left with.
_USABLE = 0.9
_MORE = 1.5
# Below this share of the time nothing is worth changing.
_SMALL = 0.05
_WASTED = 0.5
# Of the load, what is not the run's own.
_BUSY = 0.5
# Of the misses, those for which nothing was evicted.
_FILLING = 0.3


@dataclass(frozen=True)
class Cause:
    """A share of the run's time, why, what to do, and what that would bring ("" for nothing)."""

    name: str
    share: float
    cause: str
    action: str
    gain: str = ""
    tok_s: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The causes, the largest first, and what else was noticed."""

    model: str
    tok_s: float
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "hobbit.why/1", **asdict(self)}

    def lines(self) -> list[str]:
        """Return a line for each cause: share - cause - action - gain."""
        head = f"{self.model}: {self.tok_s:.2f} tok/s"
        return [head, *map(_line, self.causes), *(f"note: {note}" for note in self.notes)]


@dataclass(frozen=True)
class _Times:
    """Seconds of a generated token: in all, waiting for the disk, and what is not waiting."""

    token: float
    stall: float

    @property
    def busy(self) -> float:
        return max(self.token - self.stall, 0.0)

    def rate(self, busy: float = 1.0, read: float = 1.0) -> float:
        """Return tokens a second with these shares of the computing and of the reading."""
        disk = math.sqrt(max(self.token**2 - self.busy**2, 0.0))
        time = math.hypot(self.busy * busy, disk * read)
        return 1 / time if time > 0 else 0.0


def explain(record: dict[str, Any]) -> Explanation:
    """Explain what `feedback.finished` wrote. Raises KeyError or TypeError for anything else."""
    run, decode = record["run"], record["decode"]
    tokens = decode["tokens_generated"]
    times = _Times(
        decode["decode_s"] / tokens if tokens else 0.0, decode["stall_s"] / tokens if tokens else 0
    )
    total = (run["prompt_s"] + decode["decode_s"]) or 1.0
    causes = [
        _disk(record, times, decode["stall_s"] / total),
        _compute(record, times, _compute_s(decode) / total),
        _prompt(record, run["prompt_s"] / total),
        _prediction(decode, times, decode["predict_s"] / total),
        _management(decode["manage_s"] / total),
    ]
    if record.get("device"):  # records of older versions do not tell
        causes.append(_device(record, times, decode["device_wait_s"] / total))
    causes.sort(key=lambda cause: -cause.share)
    return Explanation(record["model"], decode["tok_s"], tuple(causes), tuple(_notes(record)))


def _compute_s(decode: dict[str, Any]) -> float:
    others = decode["stall_s"] + decode["predict_s"] + decode["manage_s"]
    others += decode["device_wait_s"]
    return max(float(decode["decode_s"] - others), 0.0)


def _disk(record: dict[str, Any], times: _Times, share: float) -> Cause:
    decode, name = record["decode"], "disk"
    if record["plan"]["mode"] != "streamed" or not decode["read_bytes"]:
        return Cause(name, share, "nothing was read for tokens", "nothing to do")
    tokens = max(decode["tokens_generated"], 1)
    missed = format_size(decode["read_bytes"] // tokens)
    cause = f"waited for the disk: {missed} a token, {100 * decode['hit_rate']:.0f} % hits"
    if share < _SMALL:
        return Cause(name, share, cause, "nothing to do")
    cap = record["plan"]["cap_bytes"]
    wanted = _more_memory(record)
    if wanted > cap:
        speed = times.rate(read=_misses(record, wanted))
        action = f"--memory {wanted >> 20}M"
        gain = f"{_gain(speed)}{_lossy(record, times)}"
        return Cause(name, share, cause, action, gain, speed)
    lossy = _lossy(record, times).removeprefix(", or ")
    if lossy:
        return Cause(name, share, cause, lossy)
    return Cause(name, share, cause, "a faster disk: this machine has no more memory to give")


def _more_memory(record: dict[str, Any]) -> int:
    """Return the cap to try: past the cliff, half as much again, or what there is."""
    plan = record["plan"]
    cap: int = plan["cap_bytes"]
    everything: int = cap - plan["spare_bytes"] - plan["cache_bytes"] + record["expert_bytes"]
    everything += everything // 100 + (16 << 20)
    wanted = max(int(cap * _MORE), int(plan["above_cliff_bytes"] or 0))
    return min(wanted, everything, int(record["machine_bytes"] * _USABLE))


def _misses(record: dict[str, Any], cap: int) -> float:
    """Return the misses with this cap over those that the run had."""
    plan, share = record["plan"], record["cached_share"]
    tokens = max(record["decode"]["tokens_generated"], 1)
    read = record["decode"]["read_bytes"] / tokens
    hit = min(max(1 - read / max(record["token_bytes"], 1), 0.0), 1.0)
    exponent = exponent_of(share, hit) or EXPONENTS.mid
    more = (cap - plan["cap_bytes"] + plan["spare_bytes"]) / max(record["expert_bytes"], 1)
    before = 1 - hit_rate(share, exponent)
    return (1 - hit_rate(min(share + more, 1.0), exponent)) / before if before > 0 else 1.0


def _lossy(record: dict[str, Any], times: _Times) -> str:
    """Return what a lossy quality would bring, as the end of a sentence."""
    if not record["exact"]:
        return ""
    modes = record["lossy_read"]
    if not modes:
        return f", or hobbit prepare {record['model']} once, then -Q balanced"
    mode = "balanced" if "balanced" in modes else next(iter(modes))
    return f", or -Q {mode} ({times.rate(read=modes[mode]):.1f} tok/s)"


def _compute(record: dict[str, Any], times: _Times, share: float) -> Cause:
    decode, threads, cores = record["decode"], record["threads"], record["cores"]
    experts = decode["moe_s"] / max(_compute_s(decode), 1e-9)
    on = f"{threads} thread{'s' if threads > 1 else ''}"
    cause = f"computed on {on}, {100 * min(experts, 1):.0f} % of it in the experts"
    if threads < cores:
        speed = times.rate(busy=threads / cores)
        return Cause("compute", share, cause, f"-t {cores}", _gain(speed), speed)
    if threads > cores:
        return Cause("compute", share, cause, f"-t {cores}: more threads than cores wait in turn")
    return Cause("compute", share, cause, "nothing to do: all cores compute")


def _prompt(record: dict[str, Any], share: float) -> Cause:
    run = record["run"]
    tokens = run["tokens_prompt"]
    cause = f"read the prompt: {tokens} tokens in {run['prompt_s']:.1f} s"
    ubatch = record["n_ubatch"]
    if share >= _SMALL and tokens > ubatch:
        rounds = -(-tokens // ubatch)
        larger = 1 << (tokens - 1).bit_length()
        return Cause(
            "prompt",
            share,
            cause,
            f"-ub {larger}",
            f"experts are read once and not {rounds} times",
        )
    return Cause("prompt", share, cause, "nothing to do but to ask for less at once")


def _prediction(decode: dict[str, Any], times: _Times, share: float) -> Cause:
    right = f"{100 * decode['prediction_accuracy']:.0f} % right"
    wasted = decode["ahead_wasted_share"]
    cause = f"predicted experts ({decode['predictor'] or 'none'}, {right})"
    if decode["predictor"] not in ("", "none") and wasted > _WASTED:
        speed = times.rate(busy=1 - share) if share < 1 else 0.0
        cause += f", {100 * wasted:.0f} % of what was read ahead in vain"
        return Cause("prediction", share, cause, "--predictor none", _gain(speed), speed)
    return Cause("prediction", share, cause, "nothing to do")


def _device(record: dict[str, Any], times: _Times, share: float) -> Cause:
    """Say what the processor waited for a device, and with how much of it none would wait."""
    decode, device = record["decode"], record["device"]
    pairs = decode["pairs_high"] + decode["pairs_low"]
    there = decode["device_pairs"]
    part = f"{100 * there / pairs:.0f} %" if pairs else "none"
    cause = f"waited for {device['name']}, which computed {part} of the experts"
    here = pairs - there
    fixed = record.get("dispatch", "auto") != "auto"
    if fixed and share >= _SMALL:
        cause += f" by --dispatch {record['dispatch']}"
    if share < _SMALL or not there or not here or not decode["moe_s"] or not decode["device_s"]:
        action = "--dispatch auto" if fixed and share >= _SMALL else "nothing to do"
        return Cause("device", share, cause, action)
    rates = there / decode["device_s"], here / decode["moe_s"]
    least = pairs / sum(rates)
    now = decode["moe_s"] + decode["device_wait_s"]
    fewer = rates[0] / sum(rates) * pairs / there
    if fewer >= 1 or least >= now:
        return Cause("device", share, cause, "nothing to do: it begins late, not too much")
    speed = times.rate(busy=1 - (now - least) / max(decode["decode_s"] - decode["stall_s"], 1e-9))
    vram = int(device["bytes"] * fewer) >> 20
    action = f"--vram {vram}M, so that both end at the same time" if vram else "do without it"
    action = "--dispatch auto, so that both end at the same time" if fixed else action
    return Cause("device", share, cause, action, _gain(speed), speed)


def _management(share: float) -> Cause:
    cause = "looked up, evicted and asked for experts"
    action = "nothing to do" if share < _SMALL else "--policy lru, which has the least to do"
    return Cause("cache", share, cause, action)


def _notes(record: dict[str, Any]) -> list[str]:
    """Return what is wrong with the machine or the cap."""
    plan, notes = record["plan"], []
    if plan["below_cliff"]:
        least = plan["above_cliff_bytes"] >> 20
        notes.append(f"the cap is below the cliff: a token's experts do not fit; --memory {least}M")
    if plan["mode"] == "streamed" and record["run"]["io"] == "buffered":
        notes.append(
            "the file system refuses direct reads, which costs processor time: move the model, or "
            "see hobbit doctor"
        )
    if record["swapped_bytes"]:
        size = format_size(record["swapped_bytes"])
        notes.append(f"{size} of the process were swapped out: lower --memory, or swapoff -a")
    if record["huge_pages"] == "never":
        notes.append(
            "huge pages are off, which makes reads dearer: "
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        )
    decode = record["decode"]
    filling = max(decode["misses"] - decode["evictions"], 0)
    if plan["mode"] == "streamed" and filling > _FILLING * max(decode["misses"], 1):
        share = 100 * filling / decode["misses"]
        notes.append(f"{share:.0f} % of the misses only filled the cache: a longer run has fewer")
    if record.get("device") and decode["device_hits"]:
        asked = max(decode["hits"] + decode["misses"], 1)
        there = 100 * decode["device_hits"] / asked
        idle = 100 * max(1 - decode["device_s"] / max(decode["decode_s"], 1e-9), 0.0)
        notes.append(
            f"{there:.0f} % of what was asked for was on {record['device']['name']}, which had "
            f"nothing to do for {idle:.0f} % of the time"
        )
    others = record["load"] - record["threads"]
    if others > _BUSY:
        notes.append(
            f"other programs compete for the {record['cores']} cores (load "
            f"{record['load']:.1f}): a thread that waits for a core stops all; fewer with -t"
        )
    predicted = record["predicted"]
    if predicted:
        low, _, high = predicted["tok_s"]
        notes.append(f"{low:.1f}-{high:.1f} tok/s were predicted")
    else:
        notes.append(f"no prediction: hobbit plan {record['model']} measures this machine, once")
    return notes


def _gain(tok_s: float) -> str:
    return f"about {tok_s:.1f} tok/s"


def _line(cause: Cause) -> str:
    words = [f"{100 * cause.share:3.0f} %", cause.cause, cause.action, cause.gain]
    return " - ".join(word for word in words if word)
