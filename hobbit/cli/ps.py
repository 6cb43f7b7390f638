"""hobbit ps: the servers that run."""

from __future__ import annotations

import json
from typing import Annotated, Any

from ..render import Screen
from .console import write
from .flags import flag


def ps(
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of a table.")
    ] = False,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Nothing on stderr.")] = False,
) -> int:
    """List this user's servers that run on this machine."""
    from ..errors import HobbitError
    from ..serve.registry import Running, running
    from ..watching.client import stats_of
    from ..watching.table import table_lines

    found: list[tuple[Running, dict[str, Any] | None]] = []
    screen = Screen(quiet)
    for server in running():
        try:
            found.append((server, stats_of(server.url, server.token)))
        except HobbitError as exc:
            screen.say(f"process {server.pid}: {exc}")
            found.append((server, None))
    if json_output:
        rows = [{"pid": s.pid, "url": s.url, "model": s.model, "stats": now} for s, now in found]
        write(json.dumps({"schema": "hobbit.ps/1", "servers": rows}) + "\n")
    elif found:
        write("\n".join(table_lines(found)) + "\n")
    else:
        screen.say("no server runs: hobbit serve MODEL starts one")
    return 0
