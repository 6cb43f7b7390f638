"""Pictures as one PNG, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plot import draw_marks, finish, new_figure, save
from . import Bars, Heat, Picture, Pictures

_SIZE = (7.0, 4.5)  # of a picture, in inches


def write_png(path: Path, pictures: Pictures) -> None:
    """Write pictures in at most two columns; raises as `hobbit.plot.plot`."""
    columns = min(len(pictures), 2)
    rows = -(-len(pictures) // columns)
    figure = new_figure(_SIZE[0] * columns, _SIZE[1] * rows)
    for number, picture in enumerate(pictures, 1):
        _draw(figure, figure.add_subplot(rows, columns, number), picture)
    save(path, figure)


def _draw(figure: Any, axes: Any, picture: Picture) -> None:
    if isinstance(picture, Heat):
        image = axes.imshow(picture.values, aspect="auto", interpolation="nearest", vmin=0)
        figure.colorbar(image, ax=axes, label=picture.unit)
        axes.set_yticks(*_named(picture.rows))
        axes.set_xlabel(picture.columns)
        axes.set_title(picture.title)
    elif isinstance(picture, Bars):
        places = np.arange(len(picture.names))
        axes.barh(places, picture.values, height=0.8)
        axes.set_yticks(*_named(picture.names))
        axes.set_ylim(len(places) - 0.5, -0.5)  # the first on top
        axes.set_xlim(0, picture.full or None)
        axes.set_xlabel(picture.unit)
        finish(axes, picture.title)
    else:
        draw_marks(axes, picture.marks, [("", picture.curve)] if picture.curve else [])
        finish(axes, picture.title)


def _named(names: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """Return the places and words of at most 24 names, evenly spaced."""
    places = [*range(0, len(names), -(-len(names) // 24))]
    return places, [names[i] for i in places]
