"""What `hobbit ps` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..listing import table
from ..render import of_cap, rate
from ..serve.registry import Running
from .panel import duration
from .window import stats_from

TITLES = ["NAME", "PID", "MEM/CAP", "MODE", "HIT", "TOK/S", "CTX", "UPTIME", "URL"]


def table_lines(servers: Sequence[tuple[Running, Mapping[str, Any] | None]]) -> list[str]:
    """Return a row for each server; None is told of one that does not answer."""
    return table(TITLES, [_cells(*server) for server in servers])


def _cells(server: Running, now: Mapping[str, Any] | None) -> list[str]:
    if now is None:
        return [server.model, f"{server.pid}", "-", "no answer", "-", "-", "-", "-", server.url]
    stats, context, speed = stats_from(now["stats"]), now["context"], now["last_tok_s"]
    asked = stats.hits + stats.misses
    return [
        str(now["model"]),
        f"{server.pid}",
        of_cap(int(now["resident_bytes"]), stats.cap_bytes) if stats.cap_bytes else "-",
        _mode(now),
        f"{100 * stats.hit_rate:.0f} %" if asked else "-",
        rate(speed) if speed is not None else "-",
        f"{context['used']}/{context['size']}",
        duration(now["uptime_s"]),
        server.url,
    ]


def _mode(now: Mapping[str, Any]) -> str:
    if now["loaded"] != "loaded":
        return str(now["loaded"])
    return str(now["mode"] if now["mode"] == "resident" else now["quality"])
