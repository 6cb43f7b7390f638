"""hobbit simulate: what other caches would have read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..render import Screen
from .console import write
from .flags import flag
from .shared import T1, T2


def simulate(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Files of hobbit trace, of one model; each further one is another sequence.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:SETTINGS]",
            help="Compare this (repeatable): belady, decay, hobbit, lcu, lfru, lfu or lru, as in "
            "decay:half_life=64,w_fld=0.1 (default: all).",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Size of the cache (repeatable): 4G, 55% of all experts, or '200 slots' "
            "(default: 25%, 50%, 75%).",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="NAME=VALUES",
            help="Compare a setting's values, as half_life=32,64 (repeatable: every combination).",
        ),
    ] = None,
    tune: Annotated[
        bool, flag("--tune", help="Print the settings that read the least, of decay and hobbit.")
    ] = False,
    predict: Annotated[
        str,
        flag("--predictions", "--predict", help="none, or recorded: the trace's own predictions."),
    ] = "none",
    odds: Annotated[
        float, flag("--odds", min=0, max=1, help="Read ahead what has at least these odds.")
    ] = 0.0,
    t1: T1 = None,
    t2: T2 = None,
    patience: Annotated[
        int,
        flag("--patience", min=0, max=65535, help="As in hobbit run."),
    ] = 0,
    deterministic: Annotated[
        bool, flag("--deterministic", help="Let the scores decide, whatever is cached.")
    ] = False,
    tokens: Annotated[
        int, flag("-n", "--tokens", min=0, help="Only the first tokens; 0: all.")
    ] = 0,
    skip: Annotated[int, flag("--skip", min=0, help="Tokens of warm-up that are not counted.")] = 0,
    one_sequence: Annotated[
        bool,
        flag("--one-sequence", help="Forget no records of uses where another sequence begins."),
    ] = False,
    disk: Annotated[
        str, flag("--disk", help="Speed of the disk in bytes a second, for the modelled tok/s.")
    ] = "500M",
    compute_ms: Annotated[
        float, flag("--compute-ms", min=0, help="Milliseconds that computing a token takes.")
    ] = 90.0,
    plot: Annotated[
        Path | None, flag("--plot", help="Draw bytes a token against the cache into this PNG.")
    ] = None,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> int:
    """Replay routing traces with other caches and policies."""
    values = dict(locals())

    from ..simulating import simulating

    for name in ("traces", "policy", "budget", "sweep"):
        values[name] = tuple(values[name] or ())
    write(simulating(values, Screen()))
    return 0
