"""What there is to see in a file: a routing trace, or a report of hobbit's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UsageError
from ..lab import Lab, LabOptions
from ..policy import parse_policy
from ..simulate import pools_of
from ..sizes import format_size
from ..trace import is_trace
from . import Bars, Picture, routing
from .reports import of_json

# Of a trace, in this order.
ROUTING = ("experts", "weights", "scores", "hits")


def pictures_of(
    path: Path,
    *,
    only: Sequence[str] = (),
    budget: str | None = None,
    policy: str,
    tokens: int = 0,
    say: Callable[[str], None],
) -> list[Picture]:
    """Return the pictures of a file; what a trace cannot show is said, and an error if asked for.

    only: of a trace, these of ROUTING. budget, policy: the cache that is replayed for the hits, by
    default the one it was recorded with. tokens: only the first so many; 0: all.
    """
    unknown = sorted({*only} - {*ROUTING})
    if unknown:
        raise UsageError(f"--only {unknown[0]}: must be one of {', '.join(ROUTING)}")
    if not is_trace(path):
        return of_json(path)
    lab = Lab(LabOptions((path,), policy=(policy,), tokens=tokens))
    found: list[Picture] = []
    for name in only or ROUTING:
        try:
            found.append(_picture(lab, name, budget, policy))
        except UsageError as exc:
            if only:
                raise
            say(f"no {name}: {exc}")
    return found


def _picture(lab: Lab, name: str, budget: str | None, policy: str) -> Picture:
    if name == "experts":
        return routing.heat(lab.trace)
    if name == "hits":
        return _hits(lab, budget, policy)
    made = routing.weights(lab.trace) if name == "weights" else routing.scores(lab.trace)
    if made is None:
        raise UsageError("the trace has no gate weights of two experts of a token")
    return made


def _hits(lab: Lab, budget: str | None, policy: str) -> Bars:
    """Replay the trace: the engine counts hits for all layers together."""
    recorded = sum(pool.bytes for pool in lab.trace.pools)
    pools = lab.pools(budget) if budget else pools_of(lab.trace, recorded)
    found = lab.run(parse_policy(policy), pools)
    size = format_size(sum(pool.bytes for pool in pools))
    return routing.hits(lab.trace, found, f"a cache of {size}, {policy}")
