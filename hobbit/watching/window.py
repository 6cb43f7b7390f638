"""What a server did lately, from what it tells every second."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..stats import LayerLookUps, Stats

_HISTORY = 60  # speeds
_LATELY = 10  # seconds, about, that rates are of


@dataclass(frozen=True)
class Seen:
    """Counters at one time."""

    time: float
    stats: Stats
    layers: tuple[LayerLookUps, ...]


class Window:
    """Takes in what comes; the rest is of the last few seconds in which there was work.

    While a model rests the numbers stay as they were.
    """

    def __init__(self) -> None:
        self.now: Mapping[str, Any] = {}
        self.speeds: deque[float] = deque(maxlen=_HISTORY)
        self._seen: deque[Seen] = deque(maxlen=_LATELY + 1)

    def add(self, told: Mapping[str, Any]) -> None:
        """Take in what the server tells; raises KeyError and TypeError for what it would not."""
        seen = Seen(float(told["time"]), stats_from(told["stats"]), _layers(told["layers"]))
        last = self._seen[-1] if self._seen else seen
        self.now = told
        works = told["state"] in ("prompt", "answer") or seen.stats != last.stats
        if not self._seen or works or len(self._seen) < 2:
            self._seen.append(seen)
        passed = seen.time - last.time
        if passed > 0:
            tokens = seen.stats.tokens_generated - last.stats.tokens_generated
            self.speeds.append(max(tokens, 0) / passed)

    @property
    def stats(self) -> Stats:
        """The counters of these seconds; those of all time where nothing happened in them."""
        first, last = self._seen[0].stats, self._seen[-1].stats
        lately = last.minus(first)
        return lately if lately.hits + lately.misses or lately.tokens_generated else last

    @property
    def layers(self) -> list[LayerLookUps]:
        first, last = self._seen[0].layers, self._seen[-1].layers
        if len(first) != len(last):
            return [*last]
        lately = [now.minus(before) for now, before in zip(last, first, strict=True)]
        return lately if any(layer.hits + layer.misses for layer in lately) else [*last]


def stats_from(plain: Mapping[str, Any]) -> Stats:
    """Return the counters of plain data; what it has besides, as rates, follows from them."""
    return Stats(**{field.name: plain[field.name] for field in fields(Stats)})


def _layers(plain: Mapping[str, Any]) -> tuple[LayerLookUps, ...]:
    columns = (plain["layer"], plain["hits"], plain["misses"])
    return tuple(LayerLookUps(*each) for each in zip(*columns, strict=True))
