"""A model for tests of evaluation: logits are a function of the context, plus noise by the rule."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hobbit.forced import Logits
from hobbit.rule import EXACT, Rule
from hobbit.stats import Stats


class FakeModel:
    """Reads 100 bytes a token once warm and 1000 before, a tenth of that low under a lossy rule."""

    def __init__(self, n_vocab: int = 50, n_ctx: int = 256, *, recurrent: bool = False) -> None:
        self.n_vocab = n_vocab
        self.n_ctx = n_ctx
        self.noise = 0.5
        self.recurrent = recurrent
        self.rule = EXACT
        self.context: list[int] = []
        self.calls: list[tuple[str, int]] = []
        self.stats = Stats(hits=7, read_bytes=12345)
        self.cached = 0
        self.on_decode: Callable[[], None] = lambda: None

    def begin(self, rule: Rule) -> None:
        self.rule, self.cached = rule, 0
        self.calls.append(("begin", 0))
        self.clear()

    def clear(self) -> None:
        self.context = []
        self.calls.append(("clear", 0))

    def keep(self, n: int) -> bool:
        if self.recurrent:
            return False
        assert n <= len(self.context)
        self.context = self.context[:n]
        self.calls.append(("keep", n))
        return True

    def logits_of(self, context: Sequence[int], rule: Rule) -> Logits:
        """Return what the model says after a context under a rule."""
        rng = np.random.default_rng(zlib.crc32(repr(list(context)).encode()))
        exact = rng.normal(0, 3, self.n_vocab)
        noise = rng.normal(0, self.noise, self.n_vocab)
        lossy = 0.0 if isinstance(rule.t1, tuple) else 1.0 - rule.t1
        return (exact + lossy * noise).astype(np.float32)

    def decode(self, tokens: Sequence[int], *, logits: bool = True) -> Logits:
        self.on_decode()
        assert len(self.context) + len(tokens) <= self.n_ctx
        self.calls.append(("decode", len(tokens)))
        rows = []
        for token in tokens:
            self.context.append(token)
            rows.append(self.logits_of(self.context, self.rule))
            size = 1000 if self.cached < 20 else 100
            lossy = self.rule != EXACT
            s = self.stats
            self.stats = replace(
                s,
                hits=s.hits + 3 * (self.cached >= 20),
                misses=s.misses + 1,
                read_bytes=s.read_bytes + size,
                read_low_bytes=s.read_low_bytes + lossy * size // 10,
                pairs_high=s.pairs_high + 4 - 2 * lossy,
                pairs_low=s.pairs_low + lossy,
                pairs_skip=s.pairs_skip + lossy,
            )
            self.cached += 1
        return np.array(rows) if logits else np.empty((0, self.n_vocab), dtype=np.float32)

    def counters(self) -> Stats:
        return self.stats
