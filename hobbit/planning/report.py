"""A plan in words, and as flags of llama-server."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..gguf_file import GGML_TYPES
from ..memory import Line
from ..quality import EXACT_NAME
from ..sizes import format_size
from . import history
from .estimate import COMPUTE_SPREAD, EXPONENTS, FIRST_TOKENS, Estimate, Range
from .others import others, others_line
from .planner import Plan, Row

_LIMITS = {
    "disk": "reading experts from the disk",
    "compute": "the processor and its memory",
    "device": "the device",
}


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan as a person reads it."""
    lines = [f"verdict: {plan.verdict}{_summary(plan)}", ""]
    quality = plan.forecast.quality
    if plan.memory is not None and quality.name != EXACT_NAME:
        lines.insert(1, f"quality: {quality.at(plan.memory.cached_share).label}")
    lines += _memory_lines(plan) if plan.memory else [plan.reason]
    if plan.estimate is not None:
        lines += ["", *_speed_lines(plan, plan.estimate)]
    lines += ["", *_table_lines(plan.rows)]
    if found := others(plan):
        lines += ["", others_line(found)]
    if plan.wanted is not None:
        least = f"--memory {plan.wanted.cap_bytes >> 20}M"
        lines += ["", f"{plan.wanted.note}: {least}, {_rate(plan.wanted.estimate)}"]
    return [*lines, "", caveat(plan)]


def _summary(plan: Plan) -> str:
    expected = plan.estimate
    if expected is None:
        return f", the smallest cap that works is --memory {-(-plan.needed_bytes >> 20)}M"
    return f", {_rate(expected)} tok/s, limited by {_LIMITS[expected.limit]}"


def _memory_lines(plan: Plan) -> list[str]:
    """Return what the cap is spent on; the sizes add up to it."""
    memory = plan.memory
    assert memory is not None
    rows = [*memory.lines, Line("spare", memory.spare_bytes, "not used")]
    rows.append(Line("cap", memory.cap.bytes, memory.cap.reason))
    rows += memory.beside
    lines = [f"{row.name:<9}{format_size(row.bytes):>12}  {row.reason}".rstrip() for row in rows]
    if memory.pools:
        floor = f"{format_size(plan.needed_bytes)} is the least that works"
        lines.append(f"floor: {floor}; a token's experts: {format_size(memory.token_bytes)}")
    if memory.below_cliff:
        lines.append(
            f"cliff: the cache is smaller than what one token uses: expect few hits; "
            f"--memory {memory.above_cliff_bytes >> 20}M is enough for that"
        )
    return lines


def _speed_lines(plan: Plan, expected: Estimate) -> list[str]:
    work, machine = plan.forecast.work, plan.forecast.machine
    dense, experts = sum(work.dense.values()), work.token_bytes
    lines = [
        f"a token: {format_size(dense)} dense and {format_size(experts)} of experts to multiply, "
        f"{1e3 * expected.compute_s:.0f} ms on {machine.n_threads} "
        f"thread{'s' if machine.n_threads > 1 else ''}",
    ]
    costs = plan.forecast.costs
    if expected.device_hit is not None and costs is not None:
        lines.append(
            f"on the device: {_percent(expected.device_hit)} of them, computed at "
            f"{costs.bytes_s / 1e9:.3g} GB/s ({costs.source}) beside the processor, "
            f"{1e3 * expected.device_s:.0f} ms with the dense weights"
        )
    if work.pieces and expected.missed_bytes:
        rate = f"{machine.speeds.read / 1e9:.2f} GB/s ({machine.io})"
        lines.append(
            f"hits: {_percent(expected.hit)}, so {format_size(expected.missed_bytes)} to read, "
            f"{1e3 * expected.disk_s:.0f} ms at {rate}"
        )
    first = expected.first_token_s
    lines.append(
        f"first token: {_seconds(first)} for a prompt of {FIRST_TOKENS} tokens "
        "(the most: with nothing cached yet)"
    )
    return lines


def _table_lines(rows: Sequence[Row]) -> list[str]:
    lines = [f"{'memory':>10}  {'experts':>7}  {'tok/s':>20}  verdict"]
    for row in rows:
        share = f"{100 * row.cached_share:.0f} %" if row.cached_share is not None else "-"
        rate = _rate(row.estimate) if row.estimate else "-"
        note = f"  {row.note}" if row.note else ""
        lines.append(
            f"{format_size(row.cap_bytes):>10}  {share:>7}  {rate:>20}  {row.verdict}{note}"
        )
    return lines


def caveat(plan: Plan) -> str:
    """Say what is measured, what is assumed, and how predictions fared here."""
    forecast = plan.forecast
    found = history.exponents(forecast.runs)
    own = found != EXPONENTS
    hits = "hit rate of earlier runs" if own else "assumed hit rate, which a run here would tell"
    disk = "given" if forecast.machine.given_read else "measured"
    parts = (
        [f"{disk} disk", "measured processor", hits]
        if forecast.work.pieces
        else ["measured processor"]
    )
    shape = "; the header is an estimate from the model's known shape" * (
        forecast.subject.estimated
    )
    parts += [f"{forecast.costs.source} device"] if forecast.costs else []
    words = ", ".join(parts)
    spread = f"the processor within {100 * COMPUTE_SPREAD:.0f} %"
    return f"{words}, {spread}, a short context; {history.said(forecast.runs)}{shape}"


def llama_server_flags(plan: Plan) -> str:
    """Return the nearest that llama-server has: a mapped file, without a hard cap."""
    context, found = plan.forecast.context, plan.forecast.subject
    words = ["llama-server", "-m", str(found.path or found.name)]
    words += ["-c", str(context.n_ctx), "-ub", str(context.n_ubatch)]
    words += ["-t", str(plan.forecast.machine.n_threads), "-ngl", str(plan.forecast.n_gpu_layers)]
    words += ["-ctk", GGML_TYPES[context.type_k].name, "-ctv", GGML_TYPES[context.type_v].name]
    if context.flash:
        words += ["-fa", "on"]
    for key, value in found.layout.kv_overrides.items():
        words += ["--override-kv", f"{key}=int:{value}"]
    fits = plan.memory is not None and plan.memory.mode != "streamed"
    words.append("--no-mmap" if fits else "--mmap")
    return shlex.join(words)


def _rate(expected: Estimate | None) -> str:
    if expected is None:
        return "-"
    low, mid, high = expected.tok_s
    return f"{_number(mid)} ({_number(low)}-{_number(high)})"


def _number(value: float) -> str:
    digits = 2 if value < 1 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _percent(found: Range) -> str:
    return f"{100 * found.mid:.0f} % ({100 * found.low:.0f}-{100 * found.high:.0f})"


def _seconds(found: Range) -> str:
    return f"{found.mid:.1f} s ({found.low:.1f}-{found.high:.1f})"
