"""hobbit doctor: is this machine fit for it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import write
from .flags import flag

EXIT_FAILED = 6


def doctor(
    place: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Where models are: a folder or a file (default: hobbit's cache)."
        ),
    ] = None,
    quick: Annotated[
        bool, flag("--quick", help="Do not measure the disk, which takes 3 seconds.")
    ] = False,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> int:
    """Check processor, memory, disk and build. Exits with 6 if something is broken."""
    from ..doctor import engine, storage, system
    from ..folders import cache_folder

    where = place.expanduser() if place else cache_folder()
    if place is None:
        with suppress(OSError):  # then the check of the disk says so
            where.mkdir(parents=True, exist_ok=True)
    checks = []
    for check in (*system.checks(), *engine.checks(), *storage.checks(where, quick)):
        checks.append(check)
        if not json_output:
            write(check.line() + "\n")
    failed = any(check.state == "FAIL" for check in checks)
    if json_output:
        report = {"schema": "hobbit.doctor/1", "ok": not failed}
        write(json.dumps(report | {"checks": [asdict(check) for check in checks]}) + "\n")
    return EXIT_FAILED if failed else 0
