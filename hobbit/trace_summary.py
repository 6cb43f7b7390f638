"""What a routing trace says in a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .trace import LAYER, SEQUENCE, Trace


@dataclass(frozen=True)
class TraceSummary:
    """Of the whole trace.

    asked: distinct experts, summed over layers and ubatches: what a cache is asked for.
    asked_bytes: of their high copies: what is read without a cache.
    used: of all experts of all layers, those that some token used.
    reused: of a token's experts in a layer, the share that the token before used there; NaN if no
    two tokens follow one another.
    entropy: of the experts' frequencies in a layer, in bits, the mean over layers; `entropy_max`
    where all are equally frequent.
    """

    tokens: int
    sequences: int
    layers: int
    events: int
    experts: int
    used: int
    asked: int
    asked_bytes: int
    reused: float
    entropy: float
    entropy_max: float
    weighted: float


def summary(trace: Trace) -> TraceSummary:
    """Return the numbers that describe a trace."""
    layers = np.flatnonzero(trace.kind == LAYER)
    asked = trace.n_distinct
    sizes = np.array([group.expert_bytes[0] for group in trace.groups], dtype=np.int64)
    of_groups = [_of_group(trace, layers[trace.group[layers] == g]) for g in range(len(sizes))]
    seen = [g for g in of_groups if g.n_rows]
    pairs = int((trace.n_rows[layers].astype(np.int64) * trace.n_used[layers]).sum())
    followed = sum(g.followed for g in seen)
    weighted = layers[trace.has_weights[layers]]
    return TraceSummary(
        tokens=max((g.n_rows for g in seen), default=0),
        sequences=max(int((trace.kind == SEQUENCE).sum()), 1),
        layers=len(trace.groups),
        events=len(trace),
        experts=sum(group.n_expert for group in trace.groups),
        used=sum(g.used for g in seen),
        asked=int(asked.sum()),
        asked_bytes=int((asked[layers] * sizes[trace.group[layers]]).sum()),
        reused=sum(g.reused for g in seen) / followed if followed else math.nan,
        entropy=float(np.mean([g.entropy for g in seen])) if seen else math.nan,
        entropy_max=float(np.mean([math.log2(g.n_expert) for g in trace.groups])),
        weighted=float((trace.n_rows[weighted] * trace.n_used[weighted]).sum()) / max(pairs, 1),
    )


@dataclass(frozen=True)
class _GroupSummary:
    n_rows: int
    used: int
    reused: int
    followed: int
    entropy: float


def _of_group(trace: Trace, events: npt.NDArray[Any]) -> _GroupSummary:
    """Count within the events of one group."""
    views = [trace[int(i)] for i in events]
    n_rows = sum(len(view.token) for view in views)
    if not n_rows:
        return _GroupSummary(0, 0, 0, 0, math.nan)
    n_expert = trace.groups[views[0].group].n_expert
    experts = np.concatenate([view.experts.ravel() for view in views]).astype(np.int64)
    widths = np.concatenate([np.full(len(v.token), v.experts.shape[1]) for v in views])
    sequence = np.concatenate([view.sequence for view in views])
    token = np.concatenate([view.token for view in views])
    follows = np.zeros(n_rows, dtype=bool)
    follows[1:] = (sequence[1:] == sequence[:-1]) & (token[1:] == token[:-1] + 1)
    row = np.repeat(np.arange(n_rows), widths)
    place = row * n_expert + experts
    again = np.isin(place, place + n_expert) & follows[row]
    counts = np.bincount(experts, minlength=n_expert)
    share = counts[counts > 0] / len(experts)
    return _GroupSummary(
        n_rows=n_rows,
        used=int((counts > 0).sum()),
        reused=int(again.sum()),
        followed=int(follows[row].sum()),
        entropy=float(-(share * np.log2(share)).sum()),
    )
