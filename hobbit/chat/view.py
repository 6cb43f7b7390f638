"""The numbers of a generation while it runs, as lines of text."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .. import meters
from ..render import memory_split, of_cap, rate, shares
from ..stats import LayerLookUps, Stats

if TYPE_CHECKING:
    from ..llama import Llama

_HISTORY = 60
_SEPARATOR = " | "
_SAMPLE_S = 0.25


@dataclass
class Live:
    """What a model does at the moment: counters since an answer began, and its recent speed.

    `tokens` and `hits` are shown of the tokens after the first, as soon as there are some: the
    prompt has other rates.
    """

    llm: Llama
    start: Stats = field(default_factory=Stats)
    started: float = 0.0
    first: Stats | None = None
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    _layers: list[LayerLookUps] = field(default_factory=list)  # before those that are shown
    _seen: tuple[float, int] = (0.0, 0)

    def begin(self) -> None:
        self.start, self.first, self.started = self.llm.stats, None, time.monotonic()
        self._layers = self.llm.look_ups
        self._seen = self.started, 0

    def token(self) -> None:
        """Say that a piece of the answer came."""
        if self.first is None:
            self.first, self._layers = self.llm.stats, self.llm.look_ups

    def layers(self) -> list[LayerLookUps]:
        """Return the look-ups by layer, of the same time as `look` tells of."""
        now = self.llm.look_ups
        if len(now) != len(self._layers):  # nothing was asked for yet
            return now
        return [layer.minus(past) for layer, past in zip(now, self._layers, strict=True)]

    def look(self) -> Stats:
        """Return the counters of the answer so far, or else of the prompt; note the speed."""
        now = self.llm.stats
        since = now.minus(self.first or self.start)
        at, tokens = self._seen
        passed = time.monotonic() - at
        if self.first is not None and passed >= _SAMPLE_S:
            self.speeds.append((since.tokens_generated - tokens) / passed)
            self._seen = time.monotonic(), since.tokens_generated
        return since


def line(live: Live, stats: Stats, width: int) -> str:
    """Return what matters most, as much of it as fits; while a prompt is read there is no speed."""
    if live.first is None and live.started:
        parts = [f"reading the prompt, {time.monotonic() - live.started:.0f} s"]
    else:
        parts = [f"{rate(stats.tok_s)} tok/s"]
    return _fitting([*parts, *_facts(live, stats)], width)


def _facts(live: Live, stats: Stats) -> list[str]:
    parts = []
    if stats.mode != "resident":
        parts.append(f"hit {100 * stats.hit_rate:.0f} %")
        if stats.device_hits:
            parts.append(f"device {100 * stats.device_share:.0f} %")
        if stats.pairs_low or stats.pairs_skip:
            parts.append(shares(stats))
        if stats.tokens_generated:
            parts.append(f"{stats.mib_per_token:.0f} MiB/tok")
            parts.append(f"stall {100 * stats.stall_share:.0f} %")
    parts.append(f"mem {of_cap(stats.peak_bytes, stats.cap_bytes)}")
    parts.append(f"ctx {live.llm.n_tokens}/{live.llm.n_ctx()}")
    if stats.mode != "resident":
        parts.append(live.llm.quality.name)
    return parts


def panel(live: Live, stats: Stats, width: int) -> list[str]:
    """Return the full view, always of as many lines."""
    llm = live.llm
    context = llm.n_tokens, llm.n_ctx()
    found = [
        "─" * width,
        *meters.rows(stats, live.layers(), live.speeds, stats.peak_bytes, context, width),
        f"         {llm.quality.name}, {memory_split(llm.plan)}",
    ]
    return [row[:width] for row in found]


PANEL_ROWS = 9


def idle_line(llm: Llama) -> str:
    """Return what there is to say before the first answer."""
    stats = llm.stats
    parts = [f"mem {of_cap(stats.peak_bytes, stats.cap_bytes)}", f"ctx {llm.n_ctx()}"]
    return _SEPARATOR.join([*parts, llm.quality.name, llm.plan.mode])


def cut(line: str, width: int) -> str:
    """Return the first parts of a line, as many as there is room for."""
    return _fitting(line.split(_SEPARATOR), width)


def _fitting(parts: list[str], width: int) -> str:
    """Join the first parts, as many as there is room for."""
    line = ""
    for part in parts:
        longer = f"{line}{_SEPARATOR}{part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line
