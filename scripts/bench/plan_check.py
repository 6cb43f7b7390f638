"""Compare what `hobbit plan` predicts with what benchmarks measured.

Takes reports of `hobbit bench -o json` or scripts/edge-bench and plans each decoding row of the
default policy and predictor: first as if the model had never run here, then with the hits of one
run, the first exact row of the same model. The processor's speed is this machine's, as plan
measures it, and the disk's is the benchmark's: so compare on the machine that ran it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from measuring import MODELS_DIR, about, machine, markdown

from hobbit.bench_rows import Row
from hobbit.errors import HobbitError, ModelError
from hobbit.gguf_file import open_gguf
from hobbit.layout import Layout, build_layout
from hobbit.memory import Cap, resolve_cap
from hobbit.planning import history
from hobbit.planning.estimate import Range
from hobbit.planning.planner import Forecast, context_of, forecast_of
from hobbit.planning.subject import Subject
from hobbit.policy import DEFAULT
from hobbit.quality import EXACT_NAME, choose

HEAD = ("model", "quality", "cap", "cached", "disk MB/s", "measured tok/s", "predicted (range)")
RATIOS = ("off by", "after one run")


@dataclass(frozen=True)
class Case:
    """A measured row, and what is predicted for it, before and after another of its model."""

    row: Row
    share: float
    first: Range
    later: Range | None

    def cells(self) -> list[str]:
        """Return the table's row."""
        measured, (low, middle, high) = self.row["median_ts"], self.first
        later = "" if self.later is None else _off(self.later.mid, measured)
        return [
            Path(self.row["model_filename"]).stem,
            self.row["mode"],
            f"{self.row['mem_bytes'] / (1 << 20):.0f} MiB" if self.row["mem_bytes"] else "none",
            f"{self.share:.0%}",
            f"{disk(self.row) / 1e6:.0f}",
            f"{measured:.1f}",
            f"{middle:.1f} ({low:.1f}-{high:.1f})",
            _off(middle, measured),
            later,
        ]


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan-check", description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    try:
        measured = [row for path in options.reports for row in decoding(path)]
        found = [*cases(measured, options.models_dir)]
    except (HobbitError, OSError, ValueError, KeyError) as exc:
        print(f"plan-check: {' '.join(str(exc).split())}", file=sys.stderr)
        return getattr(exc, "exit_code", 1)
    print(
        "\n".join([*about(machine()), "", *markdown([[*HEAD, *RATIOS], *map(Case.cells, found)])])
    )
    return 0


def decoding(report: Path) -> Iterator[Row]:
    """Yield the rows of a report that a plan tells something about."""
    found = json.loads(report.read_text(encoding="utf-8"))
    rows = found if isinstance(found, list) else [r for p in found["parts"] for r in p["rows"]]
    for row in rows:
        usual = row["policy"] == str(DEFAULT) and row["predict"] == "auto"
        if row["test"].startswith("tg") and usual and "stock" not in row["mode"]:
            yield row


def cases(measured: Sequence[Row], models: Path) -> Iterator[Case]:
    runs: dict[str, history.Run] = {}
    for row in measured:
        model = Path(row["model_filename"])
        layout = build_layout(open_gguf(model if model.exists() else models / model.name))
        forecast = forecast_for(row, layout)
        cap = Cap(row["mem_bytes"], "as measured") if row["mem_bytes"] else resolve_cap("auto")
        plan = forecast.memory(cap)
        known = runs.get(model.name)
        later = replace(forecast, runs=(known,)).expect(plan).tok_s if known else None
        yield Case(row, plan.cached_share, forecast.expect(plan).tok_s, later)
        if row["mode"] == EXACT_NAME and model.name not in runs:
            runs[model.name] = run_of(row, forecast)


def forecast_for(row: Row, layout: Layout) -> Forecast:
    """Return the forecast with the settings and the disk of a row, knowing of no run."""
    path = layout.gguf.parts[0].path
    tokens = row["n_depth"] + row["n_prompt"] + row["n_gen"]
    context = context_of(layout, max(tokens, 1), row["n_ubatch"], 1, 1)
    if row["type_k"] != "f16" or row["type_v"] != "f16":
        raise ModelError(f"{path.name}: only rows with f16 keys and values are compared")
    quality, found = choose(layout, row["mode"]), Subject(path.name, layout, path)
    made = forecast_of(found, context, quality, row["n_threads"], read_gbps=disk(row) / 1e9)
    return replace(made, runs=())


def disk(row: Row) -> float:
    """Return the bytes a second that a row's disk was held to, or else delivered."""
    return float(row["read_bps"] or row["disk_bytes_s"])


def run_of(row: Row, forecast: Forecast) -> history.Run:
    """Return what `hobbit run` would have kept of this row."""
    read = row["mib_per_token"] * (1 << 20) / forecast.work.token_bytes
    speed = row["median_ts"]
    share = row["samples"][0]["cached_share"]
    return history.Run(speed, speed, speed, speed, share, max(1 - read, 0.0), exact=True)


def _off(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %"


if __name__ == "__main__":
    sys.exit(main())
