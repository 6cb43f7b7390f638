"""The other quantisations of a known model: whether they fit, and how fast they would be.

Their headers are made from the model's shape: nothing is fetched, and nothing is measured for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..layout import build_layout
from ..memory import Cap
from ..models.mixtures import MIXTURES
from ..sizes import format_size
from .estimate import Range, work_of
from .machine import measured
from .planner import Forecast, Plan


@dataclass(frozen=True)
class Other:
    """Another quantisation under the plan's cap, of `size_bytes` in all.

    `tok_s` is None where it does not fit, or where the speed at its types was never measured here.
    """

    quant: str
    size_bytes: int
    fits: bool
    tok_s: Range | None


def others(plan: Plan) -> tuple[Other, ...]:
    """Return what models.toml lists of the model besides; nothing for a lossy quality."""
    if not plan.forecast.quality.rule.is_exact:
        return ()
    return tuple(_others(plan.forecast, plan.cap))


def others_line(found: tuple[Other, ...]) -> str:
    """Say it in one line."""
    return f"about its other quantisations: {'; '.join(map(_words, found))}"


def _others(forecast: Forecast, cap: Cap) -> Iterator[Other]:
    known, own = forecast.subject.known, forecast.subject.quant.removeprefix("UD-")
    if known is None or known.shape is None:
        return
    speeds = forecast.machine.speeds
    for quant in known.quants:
        if quant in MIXTURES and quant != own:
            layout = build_layout(known.skeleton(quant))
            work = work_of(layout)
            subject = replace(forecast.subject, layout=layout, path=None, quant=quant)
            machine = measured(
                layout, work, forecast.machine.n_threads, read=speeds.read, only_known=True
            )
            there = machine or forecast.machine
            asked = replace(forecast, subject=subject, work=work, machine=there)
            size = sum(part.size for part in layout.gguf.parts)
            try:
                divided = asked.memory(cap)
            except PlanError:
                yield Other(quant, size, False, None)
                continue
            yield Other(quant, size, True, asked.expect(divided).tok_s if machine else None)


def _words(other: Other) -> str:
    name = f"{other.quant} ({format_size(other.size_bytes)})"
    if not other.fits:
        return f"{name} does not fit"
    return f"{name} {other.tok_s.mid:.1f} tok/s" if other.tok_s else f"{name} fits"
