"""hobbit rm: remove models."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ModelError, UsageError
from ..render import Screen
from ..sizes import format_size
from .console import write
from .flags import flag

if TYPE_CHECKING:
    from ..models.removal import Removal


def rm(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="As hobbit ls names them.")
    ],
    low: Annotated[
        bool, flag("--low", help="Only the low copies that hobbit prepare made, and calibrations.")
    ] = False,
    yes: Annotated[bool, flag("-y", "--yes", help="Do not ask.")] = False,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of lines.")
    ] = False,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Nothing on stderr.")] = False,
) -> int:
    """Remove models, the demo and low copies. Never another tool's files."""
    return _rm(models, low, yes, json_output, Screen(quiet))


def _rm(names: list[str], low: bool, yes: bool, as_json: bool, screen: Screen) -> int:
    removals = [_planned(name, low) for name in names]
    if not yes and not _agreed(removals):
        screen.say("nothing was removed")
        return 1
    for removal in removals:
        removal.execute()
        if not as_json:
            write(f"removed {removal.name}: {format_size(removal.freed)}\n")
    if as_json:
        rows = [{"name": r.name, "freed": r.freed} for r in removals]
        write(json.dumps({"schema": "hobbit.rm/1", "removed": rows}) + "\n")
    return 0


def _planned(name: str, low: bool) -> Removal:
    from ..models.location import locate_here
    from ..models.removal import plan_removal
    from ..models.stores import Stored, stored_models

    located = locate_here(name)
    if located.path is None:
        raise ModelError(f"{name}: is not on this machine")
    same = (m for m in stored_models() if m.path == located.path)
    return plan_removal(next(same, Stored(name, (located.path,), located.store)), low)


def _agreed(removals: list[Removal]) -> bool:
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise UsageError("hobbit rm asks before it removes, and there is no terminal: give -y")
    names = ", ".join(f"{r.name} ({format_size(r.freed)})" for r in removals)
    sys.stderr.write(f"remove {names}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
