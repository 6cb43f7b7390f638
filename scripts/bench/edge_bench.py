"""Run the standard suite of `hobbit bench` here and write a dated report with plots.

The inflated demo (English text) and OLMoE's shape in Q4_0 (random tokens), 4 GiB each, under a cap
of 55 % of the model, with the disk as it is and held to 500 MB/s. Arms: exact, also with other
policies and predictors, and, for the demo, fast, all capped; stock llama.cpp by mmap, capped, and
without mmap, uncapped. Needs root. Missing models are made: 10 GiB of disk. It takes an hour or
more (--arms, --only, --disks and --runs make it less); --quick, a minute on the small demo, shows
only that it works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import edge_plots
import quality_speed
from measuring import (
    MODELS_DIR,
    TEXT,
    about,
    answered,
    free_stem,
    inflated_demo,
    machine,
    olmoe,
    save,
    say,
)

from hobbit import demo
from hobbit.bench import Arm, Case, Setup, file_bytes, measure
from hobbit.bench_options import cap_bytes
from hobbit.bench_rows import Row, as_markdown, rows
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.modes import companions
from hobbit.report import words
from hobbit.sizes import format_size, parse_size

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"demo": inflated_demo(), "olmoe": olmoe("Q4_0")}
# Of the small demo most is not experts: it does not run in 55 %.
MEMORY, QUICK_MEMORY = "55%model", "90%model"
CASE, QUICK_CASE = Case(128, 64, n_batch=512), Case(8, 4, n_batch=512)
# Of stock under the cap, which takes seconds a token: steady after the first.
LESS = {"n_prompt": 16, "n_gen": 12}
# Exact, as it is and with the plainest cache, without prediction, and with it whatever it brings.
ENGINES: dict[str, dict[str, Any]] = {
    "exact": {},
    "lru": {"policy": "lru", "predict": "none"},
    "none": {"predict": "none"},
    "gate": {"predict": "gate:always"},
}
ARMS = (*ENGINES, "fast", "stock-mmap", "stock")
PLOTS = {"rate": edge_plots.rates, "time": edge_plots.times, "roofline": edge_plots.rooflines}


@dataclass(frozen=True)
class Subject:
    """A model of the suite, what it is fed, and hobbit's lossy arm, if it has one."""

    name: str
    title: str
    model: Path
    text: str
    lossy: dict[str, Any] = field(default_factory=dict)  # the arguments of fast
    files: tuple[Path, ...] = ()  # that fast reads besides
    note: str = ""


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edge-bench", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny amounts on the small demo")
    add("--out", type=Path, default=ROOT / "docs" / "bench", help="(default: docs/bench)")
    add("--only", nargs="+", choices=MODELS, default=list(MODELS), help="models")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(default: all)")
    add("--runs", type=int, help="of each arm (default: 5; quick: 1)")
    add("--memory", help="the cap, as hobbit bench has it (default: 55%%model)")
    add("--disks", nargs="+", metavar="SIZE", default=["none", "500MB"], help="read limits")
    add("--threads", type=int, default=2)
    add("--interference", action="store_true", help="a second roofline, as hobbit bench has it")
    add("--models-dir", type=Path, default=MODELS_DIR)
    add("--model-file", type=Path, help="with --quick: this one in place of the demo")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    return answered("edge-bench", lambda: [run(options)])


def run(options: argparse.Namespace) -> Path:
    """Measure everything; return the report's path."""
    edge_plots.check()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "parts": []}
    stem = free_stem(options.out, report["machine"]["date"])
    for subject in subjects(options):
        for disk in options.disks:
            report["parts"].append(part(subject, disk, options))
            save(report, stem.with_suffix(".json"))
    for name, draw in PLOTS.items():
        draw(report["parts"], stem.with_name(f"{stem.name}-{name}.png"))
    file = stem.with_suffix(".md")
    file.write_text("\n".join(lines(report, stem.name)) + "\n", encoding="utf-8")
    return file


# What is measured


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    if options.quick:
        model = options.model_file or demo.ensure()
        _, known = companions(open_gguf(model), None)
        lossy = {"quality": "fast"} if known else {}
        note = "" if known else "not prepared, so without fast"
        yield Subject("demo", "small demo", model, str(TEXT), lossy, note=note)
        return
    for name in options.only:
        model = MODELS[name].path_in(options.models_dir)
        if name == "demo":
            yield inflated(model, options)
        else:
            yield Subject(name, MODELS[name].title, model, "")


def inflated(model: Path, options: argparse.Namespace) -> Subject:
    """Describe the inflated demo: fast is what the demo's own calibration gives for it."""
    parser = argparse.ArgumentParser()
    quality_speed.add_options(parser)
    own = ["demo", "--models-dir", str(options.models_dir), "--threads", str(options.threads)]
    asked = parser.parse_args(own)
    files = quality_speed.prepared(asked)
    cap = cap_bytes(options.memory or MEMORY, file_bytes(open_gguf(model)))
    rules, source = quality_speed.rules_of(asked, ["fast"], {}, files, cap)
    lossy = {"low": str(files.low), "rule": asdict(rules["fast"])}
    note = f"fast: {words(rules['fast'])}; {source}"
    return Subject("demo", MODELS["demo"].title, model, str(TEXT), lossy, (files.low,), note)


def arms(subject: Subject, cap: int, names: Sequence[str]) -> list[Arm]:
    """Return the arms of these names; without low copies there is no fast."""
    made = {name: Arm("exact", arguments=own, cap=cap) for name, own in ENGINES.items()}
    made["fast"] = Arm("fast", arguments=subject.lossy, cap=cap)
    made["stock-mmap"] = Arm("stock-mmap", "stock-mmap", cap=cap, less=LESS)
    made["stock"] = Arm("stock", "stock")
    return [made[name] for name in names if name != "fast" or subject.lossy]


def part(subject: Subject, disk: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model with the disk as it is ("none"), or held to a rate."""
    gguf = open_gguf(subject.model)
    cap = cap_bytes(options.memory or (QUICK_MEMORY if options.quick else MEMORY), file_bytes(gguf))
    case = QUICK_CASE if options.quick else CASE
    setup = Setup(
        build_layout(gguf),
        arms(subject, cap, options.arms),
        [replace(case, n_threads=options.threads)],
        subject.text,
        options.runs or (1 if options.quick else 5),
        0 if disk == "none" else parse_size(disk),
        low=subject.files,
        interference=options.interference,
    )
    say(f"{subject.title}, disk limit: {disk}")
    return {
        "name": subject.name,
        "title": subject.title,
        "disk": disk,
        "note": subject.note,
        "cap_bytes": cap,
        "size_bytes": file_bytes(gguf),
        "runs": setup.repetitions,
        "rows": [told(row) for row in rows(measure(setup, lambda text: say(f"  {text}")))],
    }


def told(row: Row) -> Row:
    """Name files by their name alone: the report is for other machines too."""
    return row | {key: Path(row[key]).name for key in ("model_filename", "text")}


# The report


def lines(report: dict[str, Any], stem: str) -> Iterator[str]:
    yield f"# edge-bench {stem}"
    yield ""
    yield from about(report["machine"])
    yield ""
    yield "What the columns mean and how it is measured: `docs/benchmarks.md`. Every sample is in"
    yield f"[{stem}.json]({stem}.json)."
    for name in PLOTS:
        yield ""
        yield f"![{name}]({stem}-{name}.png)"
    for found in report["parts"]:
        yield ""
        yield f"## {heading(found)}"
        yield ""
        yield setting(found)
        yield ""
        yield as_markdown(found["rows"], breakdown=True).rstrip()


def heading(found: dict[str, Any]) -> str:
    limit = "" if found["disk"] == "none" else f", disk held to {found['disk']}/s"
    return f"{found['title']}{limit}"


def setting(found: dict[str, Any]) -> str:
    """Say under which conditions the rows came about."""
    measured: list[Row] = found["rows"]
    cap = "no cap"
    if found["cap_bytes"]:
        share = found["cap_bytes"] / found["size_bytes"]
        cap = f"cap {format_size(found['cap_bytes'])}, {share:.0%} of the model"
    rate = measured[0]["disk_bytes_s"] / 1e6
    note = f"; {found['note']}" if found["note"] else ""
    return f"{cap}; disk {rate:.0f} MB/s; {found['runs']} alternating runs of each arm{note}."


if __name__ == "__main__":
    sys.exit(main())
