"""hobbit plot: pictures of what was recorded or measured."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..render import Screen
from .console import write
from .flags import flag
from .shared import Policy


def plot(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="A routing trace, a calibration, or the --json of hobbit run, bench or eval.",
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="PICTURE",
            help="Of a trace: experts, weights, scores or hits (repeatable; default: all).",
        ),
    ] = None,
    png: Annotated[
        Path | None, flag("-o", "--png", help="Draw into this PNG instead (needs matplotlib).")
    ] = None,
    budget: Annotated[
        str | None,
        flag(
            "--budget",
            help="For hits: size of the cache, as in hobbit simulate (default: as recorded).",
        ),
    ] = None,
    policy: Policy = "decay",
    tokens: Annotated[
        int, flag("-n", "--tokens", min=0, help="Of a trace, only the first tokens; 0: all.")
    ] = 0,
) -> int:
    """Draw routing, gate weights, hits, times, KL and bytes."""
    from .. import plot as plots
    from ..pictures.files import pictures_of

    if png:
        plots.check()
    found = [
        picture
        for file in files
        for picture in pictures_of(
            file.expanduser(),
            only=only or (),
            budget=budget,
            policy=policy,
            tokens=tokens,
            say=Screen().say,
        )
    ]
    if png:
        from ..pictures.png import write_png

        write_png(png.expanduser(), found)
        return 0
    from ..pictures.terminal import drawn

    write(drawn(found, shutil.get_terminal_size().columns, sys.stdout))
    return 0
