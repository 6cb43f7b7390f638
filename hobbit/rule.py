"""Which precision an expert is computed in: the rule, by the gate weights of its token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Which precision a (token, expert) pair needs, by s, the sum of the normalised gate weights of
    the token's more important experts: s <= t1 high, s <= t2 low, else skip.

    t1, t2: one number, or one per MoE layer group. `deterministic`: the need decides, whatever is
    cached; else it is only asked on a miss. `renormalise`: scale the other experts' gate weights up
    after a skip. `per_token`: in a batch, each token gets its own precision instead of the
    strongest need of the batch (evaluation only: makes wide batches give what single-token decoding
    gives under `deterministic`).
    """

    t1: float | tuple[float, ...] = 1.0
    t2: float | tuple[float, ...] = 1.0
    deterministic: bool = False
    renormalise: bool = False
    per_token: bool = False


EXACT = Rule()
