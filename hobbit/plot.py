"""Pictures of what is measured against bytes. They need matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HobbitError, UsageError

_MIB = 1 << 20


@dataclass(frozen=True)
class Mark:
    """One measured rule: mean KL in nats with its standard error, bytes read a token."""

    name: str
    bytes_per_token: float
    kl: float
    kl_se: float = 0.0


def check() -> None:
    """Raise UsageError where there is no matplotlib: before anything is measured for a picture."""
    try:
        import matplotlib  # noqa: F401 # only whether it is there
    except ImportError as exc:
        raise UsageError(
            "a plot needs matplotlib, which is not installed: pip install 'hobbit-moe[plot]'"
        ) from exc


def plot(
    path: Path,
    marks: Sequence[Mark],
    *,
    title: str = "",
    curves: Sequence[tuple[str, Sequence[Mark]]] = (),
) -> None:
    """Write a PNG of single marks, each with its name, and of named curves through further ones.

    KL is on a logarithmic axis: what has none, exact, is a vertical line. Raises UsageError without
    matplotlib, HobbitError where the file cannot be written.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    draw_marks(axes, marks, curves)
    finish(axes, title)
    save(path, figure)


def draw_marks(
    axes: Any, marks: Sequence[Mark], curves: Sequence[tuple[str, Sequence[Mark]]]
) -> None:
    """Draw what `plot` does into axes of matplotlib."""
    for name, points in curves:
        line = sorted((p.bytes_per_token / _MIB, p.kl) for p in points if p.kl > 0)
        axes.plot(*zip(*line, strict=True), marker=".", linewidth=1, label=name) if line else None
    for mark in marks:
        x = mark.bytes_per_token / _MIB
        if mark.kl <= 0:
            axes.axvline(x, color="gray", linestyle=":", label=f"{mark.name} (KL 0)")
            continue
        # Down to nothing cannot be drawn: an error as large as the value ends above it.
        error = [[min(mark.kl_se, 0.9 * mark.kl)], [mark.kl_se]]
        axes.errorbar(x, mark.kl, yerr=error, fmt="o", color="black", markersize=4, capsize=2)
        axes.annotate(mark.name, (x, mark.kl), xytext=(5, 5), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("MiB read a token")
    axes.set_ylabel("mean KL to exact, nats a token")


def plot_curves(
    path: Path,
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
) -> None:
    """Write a PNG of named curves through points (x, y), both axes from 0; raises as `plot`."""
    figure = new_figure()
    axes = figure.add_subplot()
    for name, points in curves:
        axes.plot(*zip(*sorted(points), strict=True), marker=".", linewidth=1, label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    finish(axes, title)
    save(path, figure)


def new_figure(width: float = 7, height: float = 4.5) -> Any:
    """Return an empty figure, in inches; raises UsageError without matplotlib."""
    check()
    # Not pyplot: that would look for a screen, and keep what it drew.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Any, title: str) -> None:
    """Give axes their title, a grid, and a legend where something has a name."""
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def save(path: Path, figure: Any) -> None:
    """Write the PNG; raise HobbitError where that cannot be done."""
    try:
        figure.savefig(path, format="png")
    except OSError as exc:
        raise HobbitError(f"cannot write {path}: {exc.strerror}") from exc
