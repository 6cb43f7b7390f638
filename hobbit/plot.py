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
    figure = _figure()
    axes = figure.add_subplot()
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
    _save(path, figure, axes, title)


def plot_curves(
    path: Path,
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
) -> None:
    """Write a PNG of named curves through points (x, y), both axes from 0; raises as `plot`."""
    figure = _figure()
    axes = figure.add_subplot()
    for name, points in curves:
        axes.plot(*zip(*sorted(points), strict=True), marker=".", linewidth=1, label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _save(path, figure, axes, title)


def _figure() -> Any:
    check()
    # Not pyplot: that would look for a screen, and keep what it drew.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(path: Path, figure: Any, axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    try:
        figure.savefig(path, format="png")
    except OSError as exc:
        raise HobbitError(f"cannot write {path}: {exc.strerror}") from exc
