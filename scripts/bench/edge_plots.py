"""The pictures of scripts/edge-bench: a panel for each part, a bar for each arm, of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hobbit.bench_rows import PARTS, Row
from hobbit.plot import check
from hobbit.policy import DEFAULT
from hobbit.prediction import Prediction

__all__ = ["check", "rates", "rooflines", "times"]

Part = dict[str, Any]
COLOURS = {"exact": "#1f77b4", "fast": "#2ca02c", "stock-mmap": "#d62728", "stock": "#7f7f7f"}
NAMES = {
    "compute_s": "experts' matrices",
    "stall_s": "waiting for reads",
    "manage_s": "cache management",
    "predict_s": "prediction",
    "device_wait_s": "waiting for a device",
    "rest_s": "attention, router, the rest",
}


@contextmanager
def panels(parts: Sequence[Part], path: Path) -> Iterator[list[tuple[Part, Any]]]:
    """Yield each part with its axes, then write the PNG."""
    # Not pyplot: that would look for a screen, and keep what it drew.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = [max(3.2, 0.8 * len(decoding(part))) for part in parts]
    figure = Figure(figsize=(sum(widths) + 1, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
    for part, panel in zip(parts, axes, strict=True):
        limit = "disk not limited" if part["disk"] == "none" else f"disk {part['disk']}/s"
        panel.set_title(f"{part['title'].partition(',')[0]}\n{limit}", fontsize=9)
        panel.grid(True, axis="y", alpha=0.2)
    yield list(zip(parts, axes, strict=True))
    figure.savefig(path, format="png")


def decoding(part: Part) -> list[Row]:
    return [row for row in part["rows"] if row["n_gen"] and not row["n_prompt"]]


def name_of(row: Row) -> str:
    """Return the arm's name, with what else tells it from other arms of that mode."""
    usual = {"policy": str(DEFAULT), "predict": str(Prediction())}
    own = [row[key] for key, value in usual.items() if row[key] not in (value, None)]
    return "\n".join([row["mode"], *own])


def bars(panel: Any, found: Sequence[Row], height: Callable[[Row], float], form: str) -> Any:
    names = [name_of(row) for row in found]
    colours = [COLOURS.get(row["mode"], "#9467bd") for row in found]
    drawn = panel.bar(names, [height(row) for row in found], color=colours)
    panel.bar_label(drawn, fmt=form, fontsize=8, padding=2)
    panel.tick_params(axis="x", labelsize=8, rotation=20)
    return drawn


def rates(parts: Sequence[Part], path: Path) -> None:
    """Draw tokens a second: medians, and the range of the runs."""
    with panels(parts, path) as drawn:
        for part, panel in drawn:
            found = decoding(part)
            bars(panel, found, lambda row: row["median_ts"], "%.3g")
            low = [row["median_ts"] - row["min_ts"] for row in found]
            high = [row["max_ts"] - row["median_ts"] for row in found]
            middle = [row["median_ts"] for row in found]
            names = [name_of(row) for row in found]
            panel.errorbar(names, middle, yerr=[low, high], fmt="none", color="black", capsize=2)
            panel.margins(y=0.15)
        drawn[0][1].set_ylabel("decoding, tokens a second")


def times(parts: Sequence[Part], path: Path) -> None:
    """Draw where a token's time goes; of stock only the whole is known."""
    with panels(parts, path) as drawn:
        for part, panel in drawn:
            found = decoding(part)
            names = [name_of(row) for row in found]
            split = [row["breakdown"]["compute_s"] is not None for row in found]
            whole = [0 if s else _ms(row, "total_s") for row, s in zip(found, split, strict=True)]
            panel.bar(names, whole, color="#c7c7c7", label="not split")
            below = [0.0] * len(found)
            there = any(_ms(row, "device_wait_s") for row in found)
            for key in [*PARTS, "rest_s"]:
                if key == "device_wait_s" and not there:
                    continue
                more = [max(_ms(row, key), 0.0) for row in found]
                panel.bar(names, more, bottom=below, label=NAMES[key])
                below = [a + b for a, b in zip(below, more, strict=True)]
            panel.tick_params(axis="x", labelsize=8, rotation=20)
            # What stock takes under the cap would leave nothing to see of the others.
            ours = [row for row, s in zip(found, split, strict=True) if s]
            top = 1.3 * max(_ms(row, "total_s") for row in ours or found)
            panel.set_ylim(0, top)
            for place, row in enumerate(found):
                at = min(_ms(row, "total_s"), 0.94 * top)
                label = f"{_ms(row, 'total_s'):.3g}"
                panel.annotate(
                    label, (place, at), (0, 2), textcoords="offset points", ha="center", fontsize=8
                )
        drawn[0][1].set_ylabel("ms a token (higher bars are cut)")
        handles, labels = drawn[0][1].get_legend_handles_labels()
        drawn[0][1].figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels) // 2, fontsize=7
        )


def _ms(row: Row, part: str) -> float:
    return 1e3 * (row["breakdown"][part] or 0.0)


def rooflines(parts: Sequence[Part], path: Path) -> None:
    """Draw a token's time over the least it can be: 1 is the roofline."""
    with panels(parts, path) as drawn:
        for part, panel in drawn:
            found = [row for row in decoding(part) if row["roofline"] is not None]
            bars(panel, found, lambda row: float(row["roofline"]), "%.2f")
            panel.axhline(1, color="black", linestyle=":")
            panel.margins(y=0.15)
        drawn[0][1].set_ylabel("time / max(compute, read)")
