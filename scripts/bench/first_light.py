"""Compare hobbit with stock llama-cpp-python on this machine and print the ratios as a table.

Each arm is a process of its own; the arms alternate, and each figure is the median of the runs.
In the capped comparisons both arms run in memory cgroups of the same limit, which covers the page
cache, and start with nothing of the model in it (needs root). In the cached ones everything fits in
memory and the first passes over the prompt are not timed. Under the cap stock gets fewer tokens: it
is slow there, and steady after the first. Missing models are made: both take 8 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import (
    MIB,
    MODELS_DIR,
    TEXT,
    TEXT_HELP,
    Run,
    about,
    arm_command,
    at_least,
    at_most,
    inflated_demo,
    machine,
    markdown,
    middle,
    olmoe,
    parse_run,
    read_rate,
    run_uncapped,
    say,
    spread,
)

from hobbit.cgroup import MemoryGroup
from hobbit.disk import drop_from_page_cache
from hobbit.errors import HobbitError
from hobbit.sizes import format_size, parse_size

MODELS = {"olmoe": olmoe("Q4_0"), "demo": inflated_demo()}


@dataclass(frozen=True)
class Comparison:
    model: str
    stock: str  # the engine that hobbit is compared with
    capped: bool
    stock_decode: int  # tokens to time
    decode: int
    warm_up: int
    prompt: int
    least_decode: float  # the smallest ratio of decode rates that is good enough

    @property
    def title(self) -> str:
        return f"{MODELS[self.model].title}, {'capped' if self.capped else 'everything cached'}"


COMPARISONS = {
    "olmoe-capped": Comparison("olmoe", "stock-mmap", True, 10, 64, 2, 0, 14.0),
    "demo-capped": Comparison("demo", "stock-mmap", True, 10, 64, 2, 0, 5.0),
    "olmoe-cached": Comparison("olmoe", "stock-memory", False, 48, 48, 2, 256, 0.95),
    "demo-cached": Comparison("demo", "stock-memory", False, 48, 48, 2, 256, 0.95),
}
LEAST_PROMPT = 0.9
# hobbit's first tokens fill its cache; stock's two load the dense weights.
HOBBIT_WARM_UP = 8


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="first-light", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each arm (default: 5)")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    parser.add_argument("--tokens", type=int, help="tokens that hobbit decodes in each capped run")
    parser.add_argument("--memory", default="2200M", help="the cap (default: 2200M)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--text", type=Path, default=TEXT, help=TEXT_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there too")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    report: dict[str, Any] = {"machine": machine(), "comparisons": {}}
    try:
        for name in options.only:
            report["comparisons"][name] = compare(name, options)
    except (HobbitError, OSError) as exc:
        print(f"first-light: {exc}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return 0


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    comparison = COMPARISONS[name]
    model = MODELS[comparison.model].path_in(options.models_dir)
    disk = read_rate(model)
    say(f"{name}: {comparison.title}; this disk reads {disk / MIB:.0f} MiB/s")
    runs: dict[str, list[Run]] = {"stock": [], "hobbit": []}
    for index in range(options.runs):
        for arm, results in runs.items():
            results.append(run_arm(comparison, arm == "hobbit", model, index, options))
            say(f"  run {index + 1} {arm}: {results[-1]['decode_tok_s']:.2f} tok/s decoding")
    return {"cap_bytes": cap_bytes(comparison, options), "disk_bytes_s": disk, "runs": runs}


def cap_bytes(comparison: Comparison, options: argparse.Namespace) -> int:
    """Return the cap, or 0 when there is none."""
    return parse_size(options.memory) if comparison.capped else 0


def run_arm(
    comparison: Comparison, is_hobbit: bool, model: Path, index: int, options: argparse.Namespace
) -> Run:
    cap = cap_bytes(comparison, options)
    decode = (options.tokens or comparison.decode) if is_hobbit else comparison.stock_decode
    warm_up = HOBBIT_WARM_UP if is_hobbit and comparison.capped else comparison.warm_up
    job = {
        "engine": "hobbit" if is_hobbit else comparison.stock,
        "model": str(model),
        "memory": cap,
        "threads": options.threads,
        "text": str(options.text) if comparison.model == "demo" else "",
        "seed": index,
        "prompt": comparison.prompt,
        "warm_up": warm_up,
        "decode": decode,
        "hashed": comparison.warm_up + comparison.stock_decode,
    }
    command = arm_command("first_light_arm.py", job)
    if not cap:
        return run_uncapped(command)
    drop_from_page_cache(model)
    with MemoryGroup(cap) as group:
        result = parse_run(group.run(command))
        return result | {"peak_bytes": group.peak_bytes}


# The table


def table(report: dict[str, Any]) -> Iterable[str]:
    yield from about(report["machine"])
    for name, result in report["comparisons"].items():
        comparison = COMPARISONS[name]
        count = len(result["runs"]["stock"])
        yield ""
        cap = f" at {format_size(result['cap_bytes'])}" if comparison.capped else ""
        disk = f"{result['disk_bytes_s'] / MIB:.0f} MiB/s"
        yield f"{comparison.title}{cap}; {count} runs of each arm, median (range); disk {disk}"
        yield ""
        head = ("", "stock", "hobbit", "hobbit/stock", "wanted")
        yield from markdown([head, *rows(comparison, result)])


def rows(comparison: Comparison, result: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    stock, ours = result["runs"]["stock"], result["runs"]["hobbit"]
    least = comparison.least_decode
    yield rate_row("decode tok/s", stock, ours, "decode_tok_s", least)
    if comparison.prompt:
        yield rate_row("prompt tok/s", stock, ours, "prompt_tok_s", LEAST_PROMPT)
    yield size_row("peak of the process MiB", stock, ours, "peak_rss_bytes", result["cap_bytes"])
    if comparison.capped:
        # The cgroup lets nobody exceed its limit: this shows that the arms ran in it.
        yield size_row("peak with page cache MiB", stock, ours, "peak_bytes", 0)
    read_s = middle(ours, "dense_bytes") / result["disk_bytes_s"]
    yield (
        "load s",
        spread(stock, "load_s"),
        spread(ours, "load_s"),
        "",
        at_most(middle(ours, "load_s"), read_s + 1),
    )
    yield size_row("read while loading MiB", stock, ours, "load_disk_bytes", 0)
    yield size_row("  by read calls MiB", stock, ours, "load_call_bytes", 0)
    yield ("dense weights MiB", "", f"{middle(ours, 'dense_bytes') / MIB:.0f}", "", "")
    hits, misses = middle(ours, "hits"), middle(ours, "misses")
    yield ("expert hits", "", f"{hits / (hits + misses or 1):.1%}", "", "")
    same = all(a["logits_sha256"] == b["logits_sha256"] for a, b in zip(stock, ours, strict=True))
    yield ("logits identical", "", "yes" if same else "NO", "", "yes")


def rate_row(
    label: str, stock: list[Run], ours: list[Run], key: str, least: float
) -> tuple[str, ...]:
    ratio = middle(ours, key) / middle(stock, key)
    return (label, spread(stock, key), spread(ours, key), f"{ratio:.2f}", at_least(ratio, least))


def size_row(
    label: str, stock: list[Run], ours: list[Run], key: str, limit: int
) -> tuple[str, ...]:
    if any(run.get(key) is None for run in stock + ours):
        return (label, "not told by this kernel", "", "", "")
    highest = max(run[key] for run in ours)
    wanted = at_most(highest / MIB, limit / MIB) if limit else ""
    return (label, spread(stock, key, MIB), spread(ours, key, MIB), "", wanted)


if __name__ == "__main__":
    sys.exit(main())
