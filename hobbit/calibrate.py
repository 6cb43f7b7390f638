"""Run a model on text to learn what its low copy is worth: importance, and what each rule costs.

Each rule is measured twice. Token by token with half of the experts cached, as a model is used:
that gives its bytes, and its KL there. And under `deterministic` and `per_token`, where every pair
that may be low is low: what no cache makes worse, and what --deterministic gives. That needs no
single steps, so that batches are wide. With patience anything may be low: all low is its bound.
"""

from __future__ import annotations

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
from .search import quantiles, search

WIDTH = 32
# An importance matrix is summed over so much text, in batches that read each expert once.
IMPORTANCE_BATCH = 512
CONTEXT = 512
# Tokens have logits, and with them a last layer, as far as memory for them is planned.
LAST_LAYER_EVERY = 8
IMPORTANCE_TOKENS = 4096


@dataclass(frozen=True)
class Effort:
    """How much text is spent on each rule, in wide batches and token by token, and on how many."""

    wide_tokens: int = 1024
    single_tokens: int = 512
    window: int = 256
    measurements: int = 8
    patience: tuple[int, ...] = (2, 4, 9)


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
                model.decode(part, logits=False, every=LAST_LAYER_EVERY)
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
        wide, single = [
            stack.enter_context(comparison(model, tokens, sample, bos=bos, on_progress=on_progress))
            for sample in (
                Sample(effort.window, effort.wide_tokens, warmup=WIDTH, width=WIDTH),
                Sample(effort.window, effort.single_tokens),
            )
        ]
        with llm.observe() as histogram:
            row = single("exact", EXACT)
            exact = _point(EXACT, wide("exact", EXACT), row)
        if llm.stats.unscored:
            raise UnsupportedModelError(
                f"{layout.gguf.parts[0].path}: its gate weights are not where hobbit looks for "
                "them: only -Q exact works"
            )

        def measure(rule: Rule) -> Point:
            name = _name(rule)
            decided = replace(rule, deterministic=True, per_token=True, patience=0)
            return exact if rule == EXACT else _point(rule, wide(name, decided), single(name, rule))

        all_low = measure(ALL_LOW)
        points = search(measure, histogram, [*BUDGETS.values()], limit=effort.measurements)
        for patience in effort.patience:
            rule = Rule(0.0, 1.0, patience=patience)
            patient = single(_name(rule), rule)
            bound = max(all_low.kl_any, patient.kl)
            points.append(replace(_point(rule, patient, patient), kl_any=bound))
        copies = llm.layout.low
        assert copies is not None
        return Calibration(
            source=fingerprint(layout.gguf),
            low_type=copies.gguf.tensors[copies.groups[0].matrices[0].name].type_name,
            text=name,
            tokens=row.n_tokens,
            exact=exact,
            all_low=all_low,
            points=tuple(points[1:]),
            quantiles=quantiles(histogram),
        )


def _name(rule: Rule) -> str:
    if rule == ALL_LOW:
        return "all low"
    patience = f", patience {rule.patience}" if rule.patience else ""
    return f"T1 {rule.t1:.3g}, T2 {rule.t2:.3g}{patience}"


def _point(rule: Rule, decided: Row, used: Row) -> Point:
    """Join what was measured where the rule decides alone, and where cached copies are used."""
    return Point(
        rule=rule,
        kl=used.kl,
        kl_any=decided.kl,
        kl_se=max(decided.kl_se, used.kl_se),
        kl_p99=used.kl_p99,
        bytes_per_token=used.bytes_per_token,
        high=decided.high,
        low=decided.low,
        skipped=decided.skipped,
    )


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
