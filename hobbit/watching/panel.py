"""What `hobbit top` shows: a panel of rows, or a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import meters
from ..render import of_cap, rate, shares
from .window import Window

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def panel(window: Window, url: str, width: int) -> list[str]:
    """Return the rows, each cut to the width."""
    now = window.now
    context, requests = now["context"], now["requests"]
    found = [
        f"{now['model']}, {mode_of(now)}   {url}   up {duration(now['uptime_s'])}",
        "─" * width,
        f"state    {doing(now)}",
        *meters.rows(
            window.stats,
            window.layers,
            window.speeds,
            int(now["resident_bytes"]),
            (context["used"], context["size"]),
            width,
        ),
        "requests " + ", ".join(f"{count} {name}" for name, count in requests.items()),
    ]
    return [row[:width] for row in found]


def line(window: Window) -> str:
    """Return the same in short."""
    now, stats = window.now, window.stats
    parts = [doing(now), f"{rate(stats.tok_s)} tok/s"]
    if stats.mode != "resident":
        parts.append(f"hit {100 * stats.hit_rate:.0f} %")
        if stats.pairs_low or stats.pairs_skip:
            parts.append(shares(stats))
        parts.append(f"{stats.mib_per_token:.0f} MiB/tok")
        parts.append(f"stall {100 * stats.stall_share:.0f} %")
    parts.append(f"mem {of_cap(int(now['resident_bytes']), stats.cap_bytes)}")
    return " | ".join(parts)


def mode_of(now: Mapping[str, Any]) -> str:
    """Say how the model runs."""
    mode = now["mode"]
    if mode is None:
        return "not loaded yet"
    return str(mode) if mode == "resident" else f"{mode}, {now['quality']}"


def doing(now: Mapping[str, Any]) -> str:
    """Say what the server does, and who waits."""
    state = str(now["state"])
    if state == "prompt" and now["prompt"]:
        state = f"prompt {now['prompt']['done']}/{now['prompt']['total']}"
    elif state == "answer":
        state = f"answer, {now['generating']} tokens"
    waiting = now["queue"]["waiting"]
    return f"{state}, {waiting} waiting" if waiting else state


def duration(seconds: float) -> str:
    """Write a time in its largest unit, and the next."""
    whole = int(seconds)
    for (size, name), (smaller, its_name) in zip(_UNITS, (*_UNITS[1:], (1, "s")), strict=True):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name} {rest} {its_name}"
    return f"{whole} s"
