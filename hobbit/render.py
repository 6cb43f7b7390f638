"""What a person reads on stderr; the answer itself, on stdout, is not written here."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .sizes import format_size

if TYPE_CHECKING:
    from .generate import Result
    from .layout import Layout
    from .low_writer import Written
    from .memory import MemoryPlan
    from .quality import Quality
    from .stats import Stats
    from .verify import VerifyRow

STATS_SCHEMA = "hobbit.stats/1"

_GIB = 1 << 30
_PROGRESS_INTERVAL_S = 10


class Report(Protocol):
    """Takes the name of a stage, the share of it that is done, and what else there is to say."""

    def __call__(self, stage: str, done: float, words: str = "") -> None: ...


class Screen:
    """Stderr: dim lines on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool = False, color: str = "auto", stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        wanted = self.terminal and "NO_COLOR" not in os.environ
        self.color = color == "always" or (color == "auto" and wanted)

    def say(self, *lines: str) -> None:
        if self.quiet:
            return
        for line in self._broken(lines) if self.terminal else lines:
            print(f"\x1b[2m{line}\x1b[0m" if self.color else line, file=self.stream, flush=True)

    def data(self, values: Mapping[str, Any]) -> None:
        """Write a line of JSON for a program to read, also when quiet."""
        print(json.dumps(values, ensure_ascii=False), file=self.stream, flush=True)

    @staticmethod
    def _broken(lines: Sequence[str]) -> Iterator[str]:
        """Yield lines that fit the terminal, broken between words."""
        width = max(shutil.get_terminal_size().columns - 1, 20)
        for row in (row for line in lines for row in line.split("\n")):
            wrapped = textwrap.wrap(
                row,
                width,
                subsequent_indent="  ",
                break_long_words=False,  # a path stays as it can be copied
                break_on_hyphens=False,
            )
            yield from wrapped or [""]

    def error(self, message: str, hint: str = "") -> None:
        """Report an error in one line, also when quiet."""
        one_line = " ".join(message.split())
        label = "\x1b[31merror:\x1b[0m" if self.color else "error:"
        print(f"hobbit: {label} {one_line}", file=self.stream)
        if hint:
            print(f"hint: {hint}", file=self.stream)
        self.stream.flush()

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Show work that takes long: a bar on a terminal, elsewhere a line now and then."""
        if self.quiet:
            yield lambda stage, done, words="": None
        elif not self.terminal:
            yield _SlowLines(self).report
        else:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(file=self.stream, no_color=not self.color)
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task("", total=1.0)

                def report(stage: str, done: float, words: str = "") -> None:
                    bar.update(task, description=f"{stage} {words}".rstrip(), completed=done)

                yield report


class _SlowLines:
    """Progress for a log file: a line for each stage, then one every ten seconds."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._stage = ""
        self._said_at = 0.0

    def report(self, stage: str, done: float, words: str = "") -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._said_at < _PROGRESS_INTERVAL_S:
            return
        more = f" ({words})" if words else ""
        line = stage if stage != self._stage else f"{stage}: {100 * done:.0f} %{more}"
        self._screen.say(line)
        self._stage, self._said_at = stage, now


_MODES = {
    "streamed": "streamed",
    "resident-experts": "all experts fit in the cache",
    "resident": "resident (nothing to stream: plain llama.cpp)",
}


def mode_line(plan: MemoryPlan, quality: Quality) -> str:
    """Say how the model runs, how exactly, and what the memory is for."""
    mode = _MODES[plan.mode]
    if plan.mode != "resident":
        mode += f", {quality.label}"
    if plan.low_is_resident:
        mode += ", all low copies resident"
    return f"mode: {mode}   memory {memory_split(plan)}"


def cap_lines(plan: MemoryPlan) -> list[str]:
    """Say why the cap is what it is, unless it is just what was asked for or chosen."""
    reason = plan.cap.reason
    return [] if reason == "as asked" or reason.startswith("auto") else [f"memory cap: {reason}"]


def model_line(layout: Layout) -> str:
    """Name the model by architecture, parameters, quantisation, size and experts."""
    gguf = layout.gguf
    total = sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())
    idle = sum(
        matrix.ne0 * matrix.ne1 * max(matrix.n_expert - layout.n_expert_used, 0)
        for group in layout.groups
        for matrix in group.matrices
    )
    bytes_of: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        bytes_of[tensor.type_name] += tensor.nbytes
    quantisation = bytes_of.most_common(1)[0][0].upper() if bytes_of else ""
    active = f"-A{_count(total - idle)}" if idle else ""
    words = [gguf.arch, f"{_count(total)}{active}", quantisation, format_size(gguf.nbytes)]
    return f"{' '.join(words)}, {_experts(layout)}"


def _experts(layout: Layout) -> str:
    blocks = layout.gguf.get(f"{layout.gguf.arch}.block_count", 0)
    layers = len({group.layer for group in layout.groups})
    if not layers:
        return f"{blocks} layers, dense"
    where = f"{layers}" if layers == blocks else f"{layers} of {blocks}"
    counts = sorted({group.n_expert for group in layout.groups})
    return f"{where} layers x {'/'.join(map(str, counts))} experts, top-{layout.n_expert_used}"


def _count(number: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            value = number / size
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.1f}{letter}"
    return str(number)


def memory_split(plan: MemoryPlan) -> str:
    """Return the plan on one line, rounded so that what is printed adds up to the cap."""
    parts = [(line.name, line.bytes) for line in plan.lines]
    parts.append(("spare", plan.spare_bytes))
    large = plan.cap.bytes - plan.spare_bytes >= 4 * _GIB
    unit, name = (_GIB // 10, "GiB") if large else (1 << 20, "MiB")
    shown = dict(zip((n for n, _ in parts), _rounded([b for _, b in parts], unit), strict=True))
    words = []
    for part, units in shown.items():
        if not units:
            continue
        share = f" = {100 * plan.cached_share:.0f} %" if part == "experts" else ""
        words.append(f"{part} {_units(units, large)}{share}")
    return f"{_units(sum(shown.values()), large)} {name} cap ({' + '.join(words)})"


def _units(units: int, tenths: bool) -> str:
    return f"{units / 10:.1f}" if tenths else str(units)


def _rounded(sizes: list[int], unit: int) -> list[int]:
    """Round to units so that the sum is the rounded sum: the largest remainders round up."""
    floors = [size // unit for size in sizes]
    short = round(sum(sizes) / unit) - sum(floors)
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(sizes[i] % unit))
    for index in by_remainder[:short]:
        floors[index] += 1
    return floors


def resident_lines(layout: Layout) -> list[str]:
    """Say which expert tensors stay resident, one line a reason."""
    names: dict[str, list[str]] = {}
    for name, reason in layout.resident:
        names.setdefault(reason, []).append(name)
    return [
        f"resident: {of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {reason}"
        for reason, of in names.items()
    ]


def stats_line(result: Result, quality: Quality, missed: str = "") -> str:
    """Return the line that ends every run; `missed` says that it was not what was predicted."""
    stats = result.stats
    prompt = f"{stats.tokens_prompt} tok prompt, {rate(stats.prompt_tok_s)} tok/s"
    first = f"first token {stats.ttft_s:.1f} s" if stats.ttft_s else "no token"
    parts = [
        f"{result.tokens} tok, {rate(stats.tok_s)} tok/s, {first} ({prompt})",
        f"mem {of_cap(stats.peak_bytes, stats.cap_bytes)}",
    ]
    if stats.mode == "resident":
        parts.append("resident")
    else:
        decode = result.decode if result.decode.hits + result.decode.misses else stats
        parts.append(quality.name)
        if decode.pairs_low or decode.pairs_skip:
            parts.append(shares(decode))
        parts.append(f"hit {100 * decode.hit_rate:.0f} %")
        if decode.device_hits:
            parts.append(f"device {100 * decode.device_share:.0f} %")
        parts.append(f"{decode.mib_per_token:.0f} MiB/tok")
        parts.append(f"stall {100 * decode.stall_share:.0f} %")
    if missed:
        parts.append(missed)
    if result.finish_reason == "cancelled":
        parts.append("cancelled")
    return f"[{' | '.join(parts)}]"


def say_stats(
    screen: Screen,
    kind: str,
    result: Result,
    plan: MemoryPlan,
    quality: Quality,
    load_s: float = 0.0,
    missed: str = "",
) -> None:
    """Say what an answer came to, as one of options.STATS; `missed` as for the line.

    With `load_s`, the seconds that loading took, where the answer is the first.
    """
    if kind == "json":
        screen.data({"schema": STATS_SCHEMA, **stats_report(result, plan, quality, load_s)})
    if kind == "full":
        screen.say(*verbose_lines(result, load_s))
    if kind in ("line", "full"):
        screen.say(stats_line(result, quality, missed))


def shares(stats: Stats) -> str:
    """Return what share of the experts had which precision."""
    names = {"high": stats.pairs_high, "low": stats.pairs_low, "skip": stats.pairs_skip}
    total = sum(names.values())
    return " ".join(f"{name} {100 * pairs / total:.0f} %" for name, pairs in names.items() if pairs)


def rate(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def of_cap(peak: int, cap: int) -> str:
    if cap >= 4 * _GIB:
        return f"{peak / _GIB:.1f}/{cap / _GIB:.1f} GiB"
    return f"{peak >> 20}/{cap >> 20} MiB"


def verbose_lines(result: Result, load_s: float) -> list[str]:
    """Return ollama's eight lines, then the memory and the counters of the experts."""
    stats = result.stats
    rows = [
        ("total duration", f"{load_s + stats.prompt_s + stats.decode_s:.2f} s"),
        ("load duration", f"{load_s:.2f} s"),
        ("prompt eval count", f"{stats.tokens_prompt} token(s)"),
        ("prompt eval duration", f"{stats.prompt_s:.2f} s"),
        ("prompt eval rate", f"{rate(stats.prompt_tok_s)} tokens/s"),
        ("eval count", f"{stats.tokens_generated} token(s)"),
        ("eval duration", f"{stats.decode_s:.2f} s"),
        ("eval rate", f"{rate(stats.tok_s)} tokens/s"),
        ("peak memory", of_cap(stats.peak_bytes, stats.cap_bytes)),
    ]
    if stats.mode != "resident":
        rows += [
            ("expert hits", f"{stats.hits} of {stats.hits + stats.misses}"),
            ("expert evictions", f"{stats.evictions}"),
            *_precision_rows(stats),
            *_device_rows(stats),
            ("read", f"{format_size(stats.read_bytes)} ({stats.io})"),
            ("waited for reads", f"{stats.stall_s:.2f} s"),
            *_token_rows(result),
        ]
    return [f"{name + ':':<22}{value}" for name, value in rows]


def _precision_rows(stats: Stats) -> list[tuple[str, str]]:
    if not stats.pairs_low and not stats.pairs_skip:
        return []
    total = stats.pairs_high + stats.pairs_low + stats.pairs_skip
    return [("low precision", f"{stats.pairs_low} of {total} pairs, {stats.pairs_skip} skipped")]


def _device_rows(stats: Stats) -> list[tuple[str, str]]:
    if not stats.device_bytes:
        return []
    return [
        ("hits on the device", f"{stats.device_hits}, for {stats.device_pairs} pairs"),
        ("copied to the device", format_size(stats.device_bytes)),
        ("device computed", f"{stats.device_s:.2f} s, waited for {stats.device_wait_s:.2f} s"),
        ("a copy there pays", _break_even(stats.break_even_tokens)),
    ]


def _break_even(tokens: int) -> str:
    return f"from {tokens} tokens of an expert on" if tokens else "never"


def _token_rows(result: Result) -> list[tuple[str, str]]:
    """Return rows on the tokens after the first one: what was predicted, and where time went."""
    decode, tokens = result.decode, result.decode.tokens_generated
    if not tokens:
        return []
    words = [decode.predictor]
    if decode.predicted:
        found = f"{100 * decode.prediction_accuracy:.0f} % right"
        words.append(f"{found} when tried" if decode.predictor == "none" else found)
    said = ", ".join(words)
    if decode.ahead_bytes:
        said += f"; {decode.ahead_mib_per_token:.1f} MiB a token read ahead"
        said += f", {100 * decode.ahead_wasted_share:.0f} % of it in vain"
    times = ", ".join(f"{name} {_ms(ms / 1000)}" for name, ms in token_time(result).items())
    # With everything cached there is nothing to predict, whichever predictor it would be.
    rows = [("prediction", said)] if decode.mode == "streamed" else []
    return [*rows, ("time of a token", f"{_ms(decode.decode_s / tokens)}: {times}")]


def token_time(result: Result) -> dict[str, float]:
    """Return in milliseconds where a token's time goes, after the first one; empty: nowhere."""
    decode, tokens = result.decode, result.decode.tokens_generated
    if not tokens or decode.mode == "resident":
        return {}
    parts = {
        "experts": decode.moe_s,
        "waiting": decode.stall_s,
        "predicting": decode.predict_s,
        "cache": decode.manage_s,
    }
    parts["the rest"] = max(decode.decode_s - sum(parts.values()), 0.0)
    return {name: 1000 * seconds / tokens for name, seconds in parts.items()}


def _ms(seconds: float) -> str:
    ms = 1000 * seconds
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def run_report(
    result: Result,
    plan: MemoryPlan,
    quality: Quality,
    config: dict[str, Any],
    load_s: float,
) -> dict[str, Any]:
    """Return what `--json` prints; `timings` has llama.cpp's keys."""
    return {
        "schema": "hobbit.run/1",
        "text": result.text,
        **stats_report(result, plan, quality, load_s),
        "config": config,
        "plan": plan.to_dict(),
    }


def stats_report(
    result: Result, plan: MemoryPlan, quality: Quality, load_s: float
) -> dict[str, Any]:
    """Return what is known of an answer besides its text."""
    stats = result.stats
    return {
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": stats.tokens_prompt,
            "completion_tokens": result.tokens,
            "total_tokens": stats.tokens_prompt + result.tokens,
        },
        "timings": {
            **_timings("prompt", stats.tokens_prompt, stats.prompt_s),
            **_timings("predicted", stats.tokens_generated, stats.decode_s),
            "load_ms": 1000 * load_s,
            "first_token_ms": 1000 * stats.ttft_s,
        },
        "token": token_time(result),
        "memory": {
            "cap_bytes": stats.cap_bytes,
            "peak_bytes": stats.peak_bytes,
            "cache_bytes": stats.cache_bytes,
        },
        "experts": {
            "hits": stats.hits,
            "misses": stats.misses,
            "evictions": stats.evictions,
            "device_hits": stats.device_hits,
            "device_pairs": stats.device_pairs,
            "device_low_pairs": stats.device_low_pairs,
            "device_bytes": stats.device_bytes,
            "device_s": stats.device_s,
            "device_wait_s": stats.device_wait_s,
            "break_even_tokens": stats.break_even_tokens,
            "hit_rate": stats.hit_rate,
            "bytes_read": stats.read_bytes,
            "mib_per_token": result.decode.mib_per_token,
            "stall_s": stats.stall_s,
            "stall_share": stats.stall_share,
            "io": stats.io,
            "bytes_read_low": stats.read_low_bytes,
            "pairs_high": stats.pairs_high,
            "pairs_low": stats.pairs_low,
            "pairs_skip": stats.pairs_skip,
            "scored": stats.scored,
            "unscored": stats.unscored,
            "promotions": stats.promotions,
            "stand_ins": stats.stand_ins,
            "predictor": stats.predictor,
            "predicted": stats.predicted,
            "predicted_right": stats.predicted_right,
            "prediction_accuracy": stats.prediction_accuracy,
            "ahead": stats.ahead,
            "ahead_used": stats.ahead_used,
            "bytes_read_ahead": stats.ahead_bytes,
            "bytes_read_in_vain": stats.ahead_wasted_bytes,
            "ahead_wasted_share": stats.ahead_wasted_share,
            "compute_s": stats.moe_s,
            "predict_s": stats.predict_s,
            "manage_s": stats.manage_s,
        },
        "quality": {
            "name": quality.name,
            "rule": asdict(quality.rule),
            "kl": quality.point.kl if quality.point else None,
            "low_file": str(quality.low.gguf.parts[0].path) if quality.low else None,
        },
        "mode": plan.mode,
    }


def _timings(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": 1000 * seconds,
        f"{name}_per_token_ms": 1000 * seconds / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds > 0 else 0.0,
    }


def low_lines(made: Written, layout: Layout) -> list[str]:
    """Say what was made of the experts, how fast, and what it lost."""
    share = made.size / layout.expert_bytes
    again = f", {format_size(made.resumed_bytes)} of it before" if made.resumed_bytes else ""
    return [
        f"{made.path}: {format_size(made.size)}, {100 * share:.0f} % of the experts",
        f"converted {format_size(made.source_bytes)}{again} in {made.seconds:.1f} s: "
        f"{made.mb_per_s:.0f} MB/s",
        loss_line(made.errors),
    ]


def loss_line(errors: Mapping[str, float]) -> str:
    """Return the relative squared error of each kind of matrix."""
    return f"squared error: {', '.join(f'{name} {100 * e:.2g} %' for name, e in errors.items())}"


def verify_lines(rows: Sequence[VerifyRow]) -> list[str]:
    """Return one line for each cache size that was compared."""
    lines = []
    for row in rows:
        size = f"{row.cache:<6}{format_size(row.bytes):>10}"
        if row.skipped:
            lines.append(f"{size}  skipped: {row.skipped}")
            continue
        counts = f"{row.misses} misses, {row.evictions} evictions"
        counts += f", {row.device_hits} hits on the device" if row.device_hits else ""
        counts += f", {row.number}" if row.number else ""
        if row.equal:
            lines.append(f"{size}  identical logits   {counts}")
        else:
            lines.append(
                f"{size}  DIFFERENT from {row.first_difference} on, "
                f"by up to {row.max_abs_diff:.3g} (NMSE {row.nmse:.2g})   {counts}"
            )
    return lines
