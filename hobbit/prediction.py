"""Which experts the next layers will use, and how far ahead to look; see native/predict.h."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError

KINDS = ("auto", "gate", "map", "none")


@dataclass(frozen=True)
class Prediction:
    """A predictor: `depth` layers ahead at most, and not where it was found to cost more than it
    brings, unless `always`."""

    kind: str = "auto"
    depth: int = 3
    always: bool = False

    def __str__(self) -> str:
        known = Prediction(self.kind)
        depth = f"depth={self.depth}" if self.depth != known.depth else ""
        settings = ",".join(filter(None, (depth, "always" if self.always else "")))
        return f"{self.kind}:{settings}" if settings else self.kind


def parse_prediction(text: str) -> Prediction:
    """Read `KIND`, `KIND:always` or `KIND:depth=2,always`; raise UsageError."""
    kind, _, settings = text.partition(":")
    if kind not in KINDS:
        raise UsageError(f"there is no predictor {kind!r}: use one of {', '.join(KINDS)}")
    depth, always = Prediction.depth, False
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if setting == "always":
            always = True
        elif name == "depth" and value.isdigit() and 1 <= int(value) <= 8:
            depth = int(value)
        else:
            raise UsageError(
                f"a predictor has no setting {setting!r}: use always, depth=1 to depth=8"
            )
    if always and kind == "auto":
        raise UsageError("auto:always contradicts itself: name a predictor, as in gate:always")
    return Prediction(kind, depth, always)
