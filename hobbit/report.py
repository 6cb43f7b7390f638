"""What the commands that measure print: tables on stdout, or JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .calibration import frontier
from .plot import Mark
from .rule import ALL_LOW, Rule
from .sizes import format_size
from .trace_summary import summary

if TYPE_CHECKING:
    from .calibration import Calibration, Point
    from .choices import ChoiceRow
    from .evaluate import Row
    from .lab import LabRow
    from .trace import Trace

SCHEMA = "hobbit.eval/1"
SIMULATION_SCHEMA = "hobbit.simulate/1"

_MIB = 1 << 20
_HEAD = (
    "mode", "KL mean", "+-", "KL p99", "KL max", "top-1", "ppl", "MiB/tok", "fewer",
    "high", "low", "skip", "hit", "tok/s",
)  # fmt: skip
_LAB_HEAD = (
    "cache", "policy", "hit", "MiB/tok", "evictions", "of LRU", "gap closed", "tok/s", "at most",
)  # fmt: skip
_TASK_HEAD = ("mode", "n", "accuracy", "+-", "by byte", "+-", "as exact", "by byte")


def eval_lines(rows: Sequence[Row]) -> list[str]:
    """Return the table of modes; `fewer` is exact's bytes a token divided by the mode's."""
    exact = rows[0].bytes_per_token
    cells: list[Sequence[str]] = [_HEAD]
    for row in rows:
        fewer = f"{exact / row.bytes_per_token:.2f}x" if row.bytes_per_token else "-"
        cells.append(
            (
                row.mode,
                f"{row.kl:.5f}",
                f"{row.kl_se:.5f}",
                f"{row.kl_p99:.4f}",
                f"{row.kl_max:.3f}",
                _percent(row.top1),
                f"{row.perplexity:.3f}",
                f"{row.bytes_per_token / _MIB:.1f}",
                fewer,
                _percent(row.high),
                _percent(row.low),
                _percent(row.skipped),
                _percent(row.hit_rate),
                f"{row.tok_s:.2f}",
            )
        )
    return _table(cells)


def calibration_lines(known: Calibration) -> list[str]:
    """Return a table of what each named mode comes to; `fewer` is of bytes, as measured."""
    cells: list[Sequence[str]] = [("mode", "KL", "+-", "any cache", "rule", "fewer bytes")]
    named = [(name, known.modes()[name]) for name in known.modes()]
    for name, point in [("exact", known.exact), *named, ("all low", known.all_low)]:
        if point is None:
            cells.append((name, "cannot be had with this low copy", *[""] * 4))
            continue
        bytes_ = point.bytes_per_token
        cells.append(
            (
                name,
                f"{point.kl:.4f}",
                f"{point.kl_se:.4f}",
                f"{point.kl_any:.4f}",
                words(point.rule),
                f"{known.exact.bytes_per_token / bytes_:.2f}x" if bytes_ else "-",
            )
        )
    return _table(cells)


def calibration_marks(known: Calibration) -> tuple[list[Mark], list[Mark]]:
    """Return the named modes and the frontier of all that was measured, for a plot."""
    named = {"exact": known.exact, **known.modes(), "all low": known.all_low}
    marks = [_mark(name, point) for name, point in named.items() if point is not None]
    return marks, [_mark("", point) for point in frontier([*known.points, known.all_low])]


def _mark(name: str, point: Point) -> Mark:
    return Mark(name, point.bytes_per_token, point.kl, point.kl_se)


def words(rule: Rule) -> str:
    """Say a rule in a few words."""
    if rule == ALL_LOW:
        return "all low"
    if rule.is_exact:
        return "all high"
    t1, t2 = ("by layer" if isinstance(t, tuple) else f"{t:.3g}" for t in (rule.t1, rule.t2))
    parts = [f"T1 {t1}", f"T2 {t2}"]
    parts += ["renormalised"] * rule.renormalise
    parts += [f"patience {rule.patience}"] * (rule.patience > 1)
    return " ".join(parts)


def trace_lines(trace: Trace) -> list[str]:
    """Return the head of a routing trace and what it comes to, one fact a line."""
    found, note = summary(trace), trace.note
    tokens = max(found.tokens, 1)
    facts = {
        "model": f"{note.get('name')} ({note.get('architecture')})",
        "tokens": f"{found.tokens}",
        "layers": f"{found.layers}",
        "events": f"{found.events}",
        "experts used": f"{found.used} of {found.experts}",
        **_other_number(note),
        "asked a token": f"{found.asked / tokens:.1f} experts, "
        f"{format_size(found.asked_bytes // tokens)}",
        "reused": f"{_percent(found.reused)} of the token before's",
        "entropy": f"{found.entropy:.2f} of {found.entropy_max:.2f} bits",
        "gate weights": f"{_percent(found.weighted)} of the pairs",
        "probabilities": "yes" if (trace.prob_at >= 0).any() else "no",
        "cache": ", ".join(format_size(pool.bytes) for pool in trace.pools),
    }
    width = max(map(len, facts))
    return [f"{name.ljust(width)}  {value}" for name, value in facts.items()]


def _other_number(note: Mapping[str, Any]) -> dict[str, str]:
    """Say how many experts a token used, where that was not the model's own number."""
    used, own = note.get("n_expert_used"), note.get("own_expert_used")
    return {"of a layer": f"{used} a token instead of {own}"} if own not in (None, used) else {}


def lab_lines(rows: Sequence[LabRow]) -> list[str]:
    """Return the table of simulated caches and policies; `at most` is the roofline's tok/s."""
    cells: list[Sequence[str]] = [_LAB_HEAD]
    for row in rows:
        cells.append(
            (
                f"{row.slots} slots, {format_size(row.cache_bytes)}",
                row.policy,
                _percent(row.hit_rate),
                f"{row.bytes_per_token / _MIB:.2f}",
                f"{row.evictions}",
                f"{row.against_lru:.3f}",
                _percent(row.closed) if math.isfinite(row.closed) else "-",
                f"{row.tok_s:.2f}",
                f"{row.roofline_tok_s:.2f}",
            )
        )
    return _table(cells, left=2)


def lab_report(rows: Sequence[LabRow], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `hobbit simulate --json` prints."""
    more = ("hit_rate", "bytes_per_token")
    return {
        "schema": SIMULATION_SCHEMA,
        **facts,
        "rows": [_plain(asdict(row) | {n: getattr(row, n) for n in more}) for row in rows],
    }


def lab_curves(rows: Sequence[LabRow]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return for each policy its bytes a token by the size of the cache, for a plot."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (row.cache_bytes / _MIB, row.bytes_per_token / _MIB)
        curves.setdefault(row.policy, []).append(point)
    return [*curves.items()]


def task_lines(name: str, rows: Sequence[ChoiceRow]) -> list[str]:
    """Return the table of one file of multiple-choice questions."""
    cells: list[Sequence[str]] = [_TASK_HEAD]
    for row in rows:
        shares = (
            row.accuracy, row.accuracy_se, row.accuracy_norm, row.accuracy_norm_se,
            row.agreement, row.agreement_norm,
        )  # fmt: skip
        cells.append((row.mode, str(row.n), *map(_percent, shares)))
    return [name, *_table(cells)]


def too_far(rows: Sequence[Row], limit: float) -> list[str]:
    """Return a line for each mode whose mean KL is above the limit."""
    return [
        f"{row.mode}: mean KL {row.kl:.5f} is above --max-kld {limit:g}"
        for row in rows
        if not row.kl <= limit
    ]


def eval_report(
    rows: Sequence[Row],
    tasks: Mapping[str, Sequence[ChoiceRow]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what `--json` prints; `facts` say what was run: model, text, memory and the like."""
    return {
        "schema": SCHEMA,
        **facts,
        "modes": [_plain(row.to_dict()) for row in rows],
        "tasks": [
            {"file": name, "modes": [asdict(row) for row in found]} for name, found in tasks.items()
        ],
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Replace what JSON has no number for: a KL may be infinite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _table(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align the first columns left and the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i >= left else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
