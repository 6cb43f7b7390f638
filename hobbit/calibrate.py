"""Run a model on text to learn what its low copy is worth: importance, and what each rule costs.

The KL of a rule is measured under `deterministic` and `per_token`, where every pair that may be low
is low, whatever is cached. Without them a cached high copy is used in place of a low one, so that a
run at any memory cap is closer to exact than that: the promise does not depend on the cap. Such a
rule needs no single steps, so that batches are wide. Bytes do depend on the cap, and on steps of
one token: they are measured in a pass of their own, with a cache of half the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .calibration import BUDGETS, Calibration, Point
from .errors import PlanError, UnsupportedModelError
from .evaluate import Progress, Row, Sample, comparison, windows
from .fingerprint import fingerprint
from .forced import Forced
from .importance import Importance
from .layout import Layout
from .llama import Llama
from .rule import ALL_LOW, EXACT, Rule
from .search import MAX_MEASUREMENTS, quantiles, search

WIDTH = 32
# An importance matrix is summed over so much text, in batches that read each expert once.
IMPORTANCE_BATCH = 512
CONTEXT = 512
IMPORTANCE_TOKENS = 4096


@dataclass(frozen=True)
class Effort:
    """How much text is spent: tokens for each rule's KL, and for its bytes."""

    kl_tokens: int = 1024
    bytes_tokens: int = 320
    window: int = 256
    measurements: int = MAX_MEASUREMENTS


def gather_importance(
    layout: Layout, text: str, *, threads: int, memory: str | int = "auto"
) -> Importance:
    """Sum the squares of what enters each expert matrix, over a text, with the exact model."""
    with closing(_opened(layout, None, threads, memory, IMPORTANCE_BATCH)) as llm:
        model = Forced(llm)
        tokens = model.tokens(text)
        sample = Sample(window=IMPORTANCE_BATCH, limit=IMPORTANCE_TOKENS, skip=0, warmup=0)
        with llm.collect() as inputs:
            for part in windows(tokens, sample, model.bos):
                model.clear()
                model.decode(part, logits=False)
    return Importance(
        "gathered from text by hobbit",
        {name: of.squares for name, of in inputs.items()},
        {name: of.rows.astype("float32") for name, of in inputs.items()},
    )


def calibrate(
    layout: Layout,
    low: Path,
    text: str,
    name: str,
    *,
    threads: int,
    memory: str | int = "auto",
    effort: Effort | None = None,
    on_progress: Progress | None = None,
) -> Calibration:
    """Measure which rules keep which budgets; `name` is the text's.

    `low` is the low copy, or the model itself if it is nested.

    Raises UnsupportedModelError for a model whose gate weights are not seen, UsageError for too
    short a text.
    """
    effort = effort or Effort()
    with closing(_opened(layout, low, threads, memory, WIDTH)) as llm, ExitStack() as stack:
        model = Forced(llm)
        tokens, bos = model.tokens(text), model.bos
        measured = [
            stack.enter_context(comparison(model, tokens, sample, bos=bos, on_progress=on_progress))
            for sample in (
                Sample(effort.window, effort.kl_tokens, warmup=WIDTH, width=WIDTH),
                Sample(effort.window, effort.bytes_tokens),
            )
        ]
        with llm.observe() as histogram:
            rows = [measured[0]("exact", EXACT)]
        if llm.stats.unscored:
            raise UnsupportedModelError(
                f"{layout.gguf.parts[0].path}: its gate weights are not where hobbit looks for "
                "them: only -Q exact works"
            )
        measured[1]("exact", EXACT)
        point = _pointer(measured)
        points = search(point, histogram, [*BUDGETS.values()], limit=effort.measurements)
        copies = llm.layout.low
        assert copies is not None
        return Calibration(
            source=fingerprint(layout.gguf),
            low_type=copies.gguf.tensors[copies.groups[0].matrices[0].name].type_name,
            text=name,
            tokens=rows[0].n_tokens,
            exact=points[0],
            all_low=point(ALL_LOW),
            points=tuple(points[1:]),
            quantiles=quantiles(histogram),
        )


def _pointer(measured: Sequence[Callable[[str, Rule], Row]]) -> Callable[[Rule], Point]:
    """Return what measures a rule: its KL by the first comparison, its bytes by the second."""

    def point(rule: Rule) -> Point:
        name = "all low" if rule == ALL_LOW else f"T1 {rule.t1:.3g}, T2 {rule.t2:.3g}"
        plain = rule if rule.is_exact else replace(rule, deterministic=True, per_token=True)
        kl = measured[0](name, plain)
        cost = measured[1](name, rule)
        return Point(
            rule=rule,
            kl=kl.kl,
            kl_se=kl.kl_se,
            kl_p99=kl.kl_p99,
            bytes_per_token=cost.bytes_per_token,
            high=kl.high,
            low=kl.low,
            skipped=kl.skipped,
        )

    return point


def _opened(layout: Layout, low: Path | None, threads: int, memory: str | int, batch: int) -> Llama:
    """Load the model with room for half of its experts, or what the cap allows."""
    arguments: dict[str, Any] = {
        "low": str(low) if low and not layout.low else None,
        "memory": memory,
        "n_ctx": CONTEXT,
        "n_batch": batch,
        "n_ubatch": batch,
        "n_threads": threads,
        "n_threads_batch": threads,
    }
    path = str(layout.gguf.parts[0].path)
    try:
        return Llama(path, cache_bytes=layout.expert_bytes // 2, **arguments)
    except PlanError:
        return Llama(path, **arguments)
