"""Which experts the next layers will use, and how far ahead to look; see native/predict.h."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

KINDS = ("auto", "gate", "map", "none")
# How many tokens' expert maps are kept if nothing was said: `auto` tries them only if asked.
_MAPS = {"auto": 0, "map": 1024}


@dataclass(frozen=True)
class Prediction:
    """A predictor: it looks `depth` layers ahead at most, what it predicts is read ahead where its
    odds are at least `odds`, and it rests where it costs more than it brings, unless `always`.
    The expert maps of `maps` tokens are kept; 0 stands for what suits the kind."""

    kind: str = "auto"
    depth: int = 2
    odds: float = 0.7
    maps: int = 0
    always: bool = False

    @property
    def map_capacity(self) -> int:
        """How many tokens' expert maps are kept."""
        return self.maps or _MAPS.get(self.kind, 0)

    def __str__(self) -> str:
        settings = [
            f"{name}={getattr(self, name):g}"
            for name in ("depth", "odds", "maps")
            if getattr(self, name) != getattr(Prediction, name)
        ]
        settings += ["always"] if self.always else []
        return f"{self.kind}:{','.join(settings)}" if settings else self.kind


def parse_prediction(text: str) -> Prediction:
    """Read `KIND`, `KIND:always` or `KIND:depth=2,odds=0.8`; raise UsageError."""
    kind, _, settings = text.partition(":")
    if kind not in KINDS:
        raise UsageError(f"there is no predictor {kind!r}: use one of {', '.join(KINDS)}")
    changed: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if setting == "always":
            changed["always"] = True
        elif name == "depth" and value in ("1", "2", "3", "4"):
            changed["depth"] = int(value)
        elif name == "odds" and re.fullmatch(r"0?\.\d+|[01]", value):
            changed["odds"] = float(value)
        elif name == "maps" and re.fullmatch(r"[1-9]\d{0,4}", value):
            changed["maps"] = int(value)
        else:
            known = "always, depth=1 to depth=4, odds=0 to odds=1, maps=1 to maps=99999"
            raise UsageError(f"a predictor has no setting {setting!r}: use {known}")
    if "always" in changed and kind == "auto":
        raise UsageError("auto:always contradicts itself: name a predictor, as in gate:always")
    if "maps" in changed and kind not in _MAPS:
        raise UsageError(f"{kind} keeps no expert maps: maps= is for {' and '.join(_MAPS)}")
    return Prediction(kind, **changed)
