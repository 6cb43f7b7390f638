"""What a run did: counters, and the rates that follow from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

_COUNTERS = (
    "tokens_prompt",
    "tokens_generated",
    "prompt_s",
    "decode_s",
    "hits",
    "misses",
    "evictions",
    "read_bytes",
    "read_low_bytes",
    "pairs_high",
    "pairs_low",
    "pairs_skip",
    "scored",
    "unscored",
    "promotions",
    "stand_ins",
    "predicted",
    "predicted_right",
    "ahead",
    "ahead_used",
    "ahead_bytes",
    "ahead_wasted_bytes",
    "device_hits",
    "device_pairs",
    "device_low_pairs",
    "device_bytes",
    "device_brought",
    "split_s",
    "split_cpu_s",
    "split_device_s",
    "split_longer_s",
    "device_s",
    "device_wait_s",
    "stall_s",
    "moe_s",
    "predict_s",
    "manage_s",
)


@dataclass(frozen=True)
class LayerLookUps:
    """How often a layer asked for one of its experts, and found it or not."""

    layer: int
    hits: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float | None:
        """None where nothing was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def plus(self, more: LayerLookUps) -> LayerLookUps:
        """Return the counters of both."""
        return LayerLookUps(self.layer, self.hits + more.hits, self.misses + more.misses)

    def minus(self, earlier: LayerLookUps) -> LayerLookUps:
        """Return what happened since `earlier`."""
        return LayerLookUps(self.layer, self.hits - earlier.hits, self.misses - earlier.misses)


@dataclass(frozen=True)
class Stats:
    """Counters of a run; a hit or miss is one expert of one layer asked for once.

    `pairs_*` are (token, expert) pairs by the precision they were computed in. `scored` are the
    pairs that were scored, `unscored` those that had to be high because the gate weights of their
    layer are not seen. `promotions` are high copies read although a low one was cached, `stand_ins`
    experts that got a resident low copy though they needed a high one.
    `predicted` are experts predicted for the next layer, `predicted_right` those that it chose.
    `ahead` are copies read because they were predicted, `ahead_used` those of them that were then
    used; `ahead_bytes` and `ahead_wasted_bytes` what was read so, and what of it was in vain.
    `predictor` is the one in force now; while "auto" tries them it changes every few tokens.
    `device_hits` are those hits that were on a device, `device_pairs` the pairs computed there,
    `device_low_pairs` those of them in low precision, `device_bytes` what was copied into its
    memory; `device_s` is the time in which it had something to do, `device_wait_s` that in which
    the CPU had nothing to do but wait for it.
    `device_brought` are experts that were copied there to be computed at once. Of the layers that
    both computed, `split_s` is the time, `split_cpu_s` and `split_device_s` each one's part, and
    `split_longer_s` the sum of the longer ones. `break_even_tokens`, as of now: with so many tokens
    of one expert it pays to copy it to the device and compute it there; 0: it never does.
    `stall_s` is the time in which computing waited for a read, `moe_s` the time in the experts'
    matrices, `predict_s` that of predicting, `manage_s` of looking up, evicting and asking.
    """

    tokens_prompt: int = 0
    tokens_generated: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    read_bytes: int = 0
    read_low_bytes: int = 0
    pairs_high: int = 0
    pairs_low: int = 0
    pairs_skip: int = 0
    scored: int = 0
    unscored: int = 0
    promotions: int = 0
    stand_ins: int = 0
    predicted: int = 0
    predicted_right: int = 0
    ahead: int = 0
    ahead_used: int = 0
    ahead_bytes: int = 0
    ahead_wasted_bytes: int = 0
    device_hits: int = 0
    device_pairs: int = 0
    device_low_pairs: int = 0
    device_bytes: int = 0
    device_brought: int = 0
    split_s: float = 0.0
    split_cpu_s: float = 0.0
    split_device_s: float = 0.0
    split_longer_s: float = 0.0
    break_even_tokens: int = 0
    device_s: float = 0.0
    device_wait_s: float = 0.0
    stall_s: float = 0.0
    moe_s: float = 0.0
    predict_s: float = 0.0
    manage_s: float = 0.0
    predictor: str = ""
    io: str = ""
    cap_bytes: int = 0
    peak_bytes: int = 0
    cache_bytes: int = 0
    mode: str = "resident"

    @property
    def hit_rate(self) -> float:
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    @property
    def device_share(self) -> float:
        """The share of what was asked for that was on a device."""
        asked = self.hits + self.misses
        return self.device_hits / asked if asked else 0.0

    @property
    def mib_per_token(self) -> float:
        """MiB read for each token that was processed, of the prompt or generated."""
        tokens = self.tokens_prompt + self.tokens_generated
        return self.read_bytes / (1 << 20) / tokens if tokens else 0.0

    @property
    def tok_s(self) -> float:
        return self.tokens_generated / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prompt_tok_s(self) -> float:
        return self.tokens_prompt / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def stall_share(self) -> float:
        total = self.prompt_s + self.decode_s
        return min(self.stall_s / total, 1.0) if total > 0 else 0.0

    @property
    def prediction_accuracy(self) -> float:
        """The share of the experts predicted for the next layer that it then chose."""
        return self.predicted_right / self.predicted if self.predicted else 0.0

    @property
    def ahead_mib_per_token(self) -> float:
        """Of `mib_per_token`, what was read for predictions."""
        tokens = self.tokens_prompt + self.tokens_generated
        return self.ahead_bytes / (1 << 20) / tokens if tokens else 0.0

    @property
    def ahead_wasted_share(self) -> float:
        """The share of what was read for predictions that was never used."""
        # Of a part of a run it can be more: what was read before it is given up in it.
        return min(self.ahead_wasted_bytes / self.ahead_bytes, 1.0) if self.ahead_bytes else 0.0

    def plus(self, more: Stats) -> Stats:
        """Return the counters of both."""
        both = {name: getattr(self, name) + getattr(more, name) for name in _COUNTERS}
        return replace(self, **both)

    def minus(self, earlier: Stats) -> Stats:
        """Return what happened since `earlier`."""
        since = {name: getattr(self, name) - getattr(earlier, name) for name in _COUNTERS}
        return replace(self, **since)

    def to_dict(self) -> dict[str, Any]:
        """Return counters and rates as plain data."""
        return asdict(self) | {
            "hit_rate": self.hit_rate,
            "device_share": self.device_share,
            "mib_per_token": self.mib_per_token,
            "tok_s": self.tok_s,
            "prompt_tok_s": self.prompt_tok_s,
            "stall_share": self.stall_share,
            "prediction_accuracy": self.prediction_accuracy,
            "ahead_mib_per_token": self.ahead_mib_per_token,
            "ahead_wasted_share": self.ahead_wasted_share,
        }
