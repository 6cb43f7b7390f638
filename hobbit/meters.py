"""The numbers of a model while it runs, as rows of text: the chat's panel and `hobbit top`."""

from __future__ import annotations

from collections.abc import Sequence

from .render import of_cap, rate, shares
from .stats import LayerLookUps, Stats

_BLOCKS = " ▁▂▃▄▅▆▇█"
_NOT_ASKED = "·"
_LEAST_BAR, _WIDEST_BAR, _WORDS = 6, 40, 30


def rows(
    stats: Stats,
    layers: Sequence[LayerLookUps],
    speeds: Sequence[float],
    held: int,
    context: tuple[int, int],
    width: int,
) -> list[str]:
    """Return seven rows: `stats` and `layers` of the time that they are about, `held` the bytes in
    memory, `context` the tokens that are used of all.
    """
    bar = max(min(width - _WORDS, _WIDEST_BAR), _LEAST_BAR)
    asked = stats.hits + stats.misses
    hit = stats.hits / asked if asked else 0.0
    used, size = context
    return [
        f"speed    {rate(stats.tok_s):>5} tok/s  {sparkline(speeds, bar)}",
        f"experts  {100 * hit:>5.0f} % hit  {filled(hit, bar)}  "
        f"{stats.misses} missed{_on_device(stats)}",
        f"layers   {strip(layers, bar + len('  100 % hit'))}{_lowest(layers)}",
        f"computed {shares(stats) or 'nothing yet'}",
        f"read     {stats.mib_per_token:>5.0f} MiB a token, {_mib_s(stats):.0f} MiB/s, "
        f"stall {100 * stats.stall_share:.0f} %",
        f"memory   {filled(held / stats.cap_bytes if stats.cap_bytes else 0.0, bar)}  "
        f"{of_cap(held, stats.cap_bytes)}",
        f"context  {filled(used / size if size else 0.0, bar)}  {used}/{size}",
    ]


def _on_device(stats: Stats) -> str:
    share = stats.device_share
    return f", {100 * share:.0f} % on the device" if share else ""


def _mib_s(stats: Stats) -> float:
    seconds = stats.prompt_s + stats.decode_s
    return stats.read_bytes / seconds / (1 << 20) if seconds else 0.0


def filled(share: float, width: int) -> str:
    """Return a bar."""
    done = round(min(max(share, 0.0), 1.0) * width)
    return "█" * done + "░" * (width - done)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the last values as bars, the highest of them full."""
    shown = [*values][-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(_BLOCKS[round(value / top * (len(_BLOCKS) - 1))] for value in shown)


def strip(layers: Sequence[LayerLookUps], width: int) -> str:
    """Return the share of hits of each layer as a bar, a full one for all.

    Where there are more layers than columns, neighbours share one; a layer that was not asked for
    anything is a dot.
    """
    each = -(-len(layers) // width) if layers else 1
    cells = (layers[i : i + each] for i in range(0, len(layers), each))
    return "".join(map(_cell, cells))


def _cell(layers: Sequence[LayerLookUps]) -> str:
    hits, misses = sum(layer.hits for layer in layers), sum(layer.misses for layer in layers)
    if not hits + misses:
        return _NOT_ASKED
    # The lowest bar is none at all, which a person would take for a gap.
    return _BLOCKS[1 + round(hits / (hits + misses) * (len(_BLOCKS) - 2))]


def _lowest(layers: Sequence[LayerLookUps]) -> str:
    rates = [(layer.hit_rate, layer.layer) for layer in layers if layer.hit_rate is not None]
    if not rates:
        return ""
    lowest, layer = min(rates)
    return f"  lowest {100 * lowest:.0f} % in {layer}"
