"""Pictures in characters: blocks and shades, in colours where the terminal has them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from ..plot import Mark
from . import Bars, Heat, Picture, Pictures, Points

_MIB = 1 << 20
_SHADES = " ░▒▓█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NARROWEST, _WIDEST = 20, 160
_ROWS = 12  # of a diagram of points
# From nothing to much: dark blue, green, yellow.
_RAMP = ((40, 44, 100), (35, 140, 140), (100, 200, 95), (253, 231, 60))


def drawn(pictures: Pictures, width: int, stream: TextIO) -> str:
    """Return the pictures as text of at most `width` columns, with what colours `stream` takes."""
    width = min(max(width, _NARROWEST), _WIDEST)
    console = Console(file=stream, width=width, highlight=False)
    colored = console.color_system is not None and not console.no_color
    with console.capture() as captured:
        for number, picture in enumerate(pictures):
            lines = list(_lines(picture, width, colored))
            for line in [Text(""), *lines] if number else lines:
                line.rstrip()
                console.print(line, no_wrap=True, overflow="crop", crop=True)
    return captured.get()


def _lines(picture: Picture, width: int, colored: bool) -> Iterator[Text]:
    yield from Text(picture.title, style="bold").wrap(Console(width=width), width)
    if isinstance(picture, Heat):
        yield from _heat(picture, width, colored)
    elif isinstance(picture, Bars):
        yield from _bars(picture, width)
    else:
        yield from _points(picture, width)


def _heat(heat: Heat, width: int, colored: bool) -> Iterator[Text]:
    label = max(map(len, heat.rows)) + 1
    space, n = width - label, heat.values.shape[1]
    each = -(-n // space)  # columns of the heat map in one of the screen
    wide = min(space // -(-n // each), 3)  # or the other way round
    top = float(np.nanmax(heat.values, initial=0.0)) or 1.0
    paint = _coloured if colored else _shaded
    for name, values in zip(heat.rows, heat.values, strict=True):
        line = Text(name.ljust(label))
        for value in _merged(values, each):
            line.append_text(Text(" " * wide) if math.isnan(value) else paint(value / top, wide))
        yield line
    scale = Text("0 ").append_text(Text().join(paint(step / 8, 1) for step in range(9)))
    scale.append(f" {_number(top)} {heat.unit}")
    scale.append(f", {each} {heat.columns}s a column" if each > 1 else "")
    yield scale


def _merged(values: npt.NDArray[Any], each: int) -> list[float]:
    """Return the means of so many neighbours, NaN where there are none."""
    parts = (values[i : i + each] for i in range(0, len(values), each))
    return [float(np.nanmean(p)) if not np.isnan(p).all() else math.nan for p in parts]


def _shaded(share: float, width: int) -> Text:
    """Only nothing at all is blank."""
    shade = _SHADES[min(math.ceil(share * (len(_SHADES) - 1)), len(_SHADES) - 1)]
    return Text(shade * width)


def _coloured(share: float, width: int) -> Text:
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(at), len(_RAMP) - 2)
    mixed = (
        round(a + (b - a) * (at - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True)
    )
    return Text("█" * width, style="rgb({},{},{})".format(*mixed))


def _bars(bars: Bars, width: int) -> Iterator[Text]:
    label = max(map(len, bars.names)) + 1
    said = ["-" if math.isnan(v) else f"{_number(v)} {bars.unit}" for v in bars.values]
    space = width - label - max(map(len, said)) - 1
    full = bars.full or np.nanmax(bars.values, initial=0.0) or 1.0
    for name, value, words in zip(bars.names, bars.values, said, strict=True):
        length = 0.0 if math.isnan(value) else min(value / full, 1.0) * space
        line = Text(name.ljust(label)).append(_bar(length), style="cyan")
        yield line.append(f" {words}")


def _bar(length: float) -> str:
    """Return a bar so many characters long, to an eighth of one."""
    whole, eighths = divmod(round(8 * length), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def _points(points: Points, width: int) -> Iterator[Text]:
    """Draw KL, on a logarithmic axis, against bytes; marks are letters, explained below."""
    lettered = [*zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", points.marks, strict=False)]
    drawn = [m for m in (*points.curve, *points.marks) if m.kl > 0]
    if drawn:
        yield from _diagram(points.curve, lettered, drawn, width)
    for letter, mark in lettered:
        kl = f"KL {mark.kl:.4f}" if mark.kl > 0 else "KL 0 (not in the diagram)"
        yield Text(f"{letter} {mark.name}: {kl}, {_number(mark.bytes_per_token / _MIB)} MiB")


def _diagram(
    curve: Sequence[Mark], lettered: Sequence[tuple[str, Mark]], drawn: list[Mark], width: int
) -> Iterator[Text]:
    lows, highs = (math.log(f(m.kl for m in drawn)) for f in (min, max))
    most = max(m.bytes_per_token for m in drawn) or 1.0
    space = width - 9
    grid = [[" "] * space for _ in range(_ROWS)]
    for letter, mark in [*(("·", m) for m in curve), *lettered]:
        if mark.kl > 0:
            up = (math.log(mark.kl) - lows) / ((highs - lows) or 1.0)
            x = round(mark.bytes_per_token / most * (space - 1))
            grid[round((1 - up) * (_ROWS - 1))][x] = letter
    ends = {0: f"{math.exp(highs):.4f}", _ROWS - 1: f"{math.exp(lows):.4f}"}
    for row, cells in enumerate(grid):
        yield Text(f"{ends.get(row, ''):>7} ┤" + "".join(cells).rstrip())
    yield Text("KL".rjust(7) + " └" + "─" * space)
    right = f"{_number(most / _MIB)} MiB a token"
    yield Text("        0" + right.rjust(space))
