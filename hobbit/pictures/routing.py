"""Pictures of a routing trace: who is chosen, with which weights and scores, and is cached."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..simulate import Simulated
from ..trace import LAYER, Trace
from . import Bars, Heat

_BINS = 16

Floats = npt.NDArray[np.float64]


def heat(trace: Trace) -> Heat:
    """Show for each expert of each layer what share of the tokens used it."""
    most = max(group.n_expert for group in trace.groups)
    values = np.full((len(trace.groups), most), np.nan)
    for index, group in enumerate(trace.groups):
        values[index, : group.n_expert] = 0
        events = _layers(trace, index)
        rows = int(trace.n_rows[events].sum())
        if rows:
            chosen = np.concatenate([trace.experts[_pairs(trace, i)] for i in events])
            counts = np.bincount(chosen, minlength=group.n_expert)
            values[index, : group.n_expert] = 100 * counts / rows
    title = "experts: share of the tokens that used each"
    return Heat(title, _names(trace), values, "expert")


def weights(trace: Trace) -> Bars | None:
    """Show how large gate weights are, a token's scaled to sum 1; None: the trace has none."""
    found = [np.ravel(shares) for shares in _shares(trace)]
    if not found:
        return None
    return _histogram("gate weights: share of the experts a token uses", np.concatenate(found))


def scores(trace: Trace) -> Bars | None:
    """Show the scores s of the experts that are not a token's first; None without gate weights.

    s is the sum of the weights larger than the expert's own: see docs/quality.md.
    """
    found = [np.cumsum(shares, axis=1)[:, :-1].ravel() for shares in _shares(trace)]
    values = np.concatenate(found) if found else np.zeros(0)
    if not len(values):
        return None
    title = "score s: share of the experts a token uses, its first left out"
    return _histogram(title, np.minimum(values, 1.0), top=1.0)


def hits(trace: Trace, found: Simulated, cache: str) -> Bars:
    """Show what share of the experts that a layer asks for is found in the cache."""
    values = []
    for index in range(len(trace.groups)):
        events = _layers(trace, index)
        hit, missed = int(found.hits[events].sum()), int(found.misses[events].sum())
        values.append(100 * hit / (hit + missed) if hit + missed else np.nan)
    return Bars(f"hits by layer: {cache}", _names(trace), tuple(values), full=100)


def _names(trace: Trace) -> tuple[str, ...]:
    return tuple(f"layer {group.layer}" for group in trace.groups)


def _layers(trace: Trace, group: int) -> npt.NDArray[np.intp]:
    return np.flatnonzero((trace.kind == LAYER) & (trace.group == group))


def _pairs(trace: Trace, event: Any) -> slice:
    start = int(trace.pair_at[event])
    return slice(start, start + int(trace.n_rows[event]) * int(trace.n_used[event]))


def _shares(trace: Trace) -> Iterator[Floats]:
    """Yield [rows, n_used]: the weights of tokens in a layer, largest first, scaled to sum 1."""
    seen = (trace.kind == LAYER) & trace.has_weights & (trace.n_rows > 0)
    for used in np.unique(trace.n_used[seen]):
        events = np.flatnonzero(seen & (trace.n_used == used))
        flat = np.concatenate([trace.weights[_pairs(trace, i)] for i in events])
        rows = -np.sort(-np.abs(flat.astype(np.float64)).reshape(-1, used), axis=1)
        sums = rows.sum(axis=1)
        sound = np.isfinite(sums) & (sums > 0)
        yield rows[sound] / sums[sound, None]


def _histogram(title: str, values: Floats, top: float = 0.0) -> Bars:
    """Show what percentage of the values each of equal bins has."""
    top = top or float(values.max(initial=0.0)) or 1.0
    counts, edges = np.histogram(values, bins=_BINS, range=(0.0, top))
    names = tuple(f"{a:.2f}-{b:.2f}" for a, b in pairwise(edges))
    return Bars(title, names, tuple(100 * counts / max(len(values), 1)))
