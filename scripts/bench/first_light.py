"""Compare hobbit with stock llama-cpp-python on this machine and print the ratios as a table.

Each arm is a process of its own; the arms alternate, and each figure is the median of the runs.
In the capped comparisons both arms run in memory cgroups of the same limit, which covers the page
cache, and start with nothing of the model in it (needs root). In the cached ones everything fits in
memory and the first passes over the prompt are not timed. Under the cap stock gets fewer tokens: it
is slow there, and steady after the first. Missing models are made: both take 8 GiB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmodels
import llama_cpp
from cgroup import CapUnavailable, MemoryGroup

import hobbit
from hobbit import demo
from hobbit.errors import HobbitError
from hobbit.sizes import format_size, parse_size

HERE = Path(__file__).parent
MIB = 1 << 20
MODELS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "olmoe": (
        "olmoe-1b-7b-Q4_0.gguf",
        "OLMoE-1B-7B shape Q4_0, random tokens",
        lambda path: benchmodels.synthesize(
            "olmoe-1b-7b",
            benchmodels.SHAPES["olmoe-1b-7b"],
            benchmodels.SYNTHETIC_TYPES["Q4_0"],
            path,
        ),
    ),
    "demo": (
        f"{demo.path().stem}-4G.gguf",  # names the demo's version
        "demo inflated to 4 GiB, English text",
        lambda path: benchmodels.inflate(demo.ensure(), path, parse_size("4G")),
    ),
}
TEXT_HELP = "what the demo reads (default: the Declaration of Independence, public domain)"
Run = dict[str, Any]


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
        return f"{MODELS[self.model][1]}, {'capped' if self.capped else 'everything cached'}"


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
    parser.add_argument("--models-dir", type=Path, default=demo.path().parent / "bench")
    parser.add_argument("--tokens", type=int, help="tokens that hobbit decodes in each capped run")
    parser.add_argument("--memory", default="2200M", help="the cap (default: 2200M)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--text", type=Path, default=HERE / "text.txt", help=TEXT_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there too")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    report: dict[str, Any] = {"machine": machine(), "comparisons": {}}
    try:
        options.models_dir.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            report["comparisons"][name] = compare(name, options)
    except (HobbitError, CapUnavailable, OSError) as exc:
        print(f"first-light: {exc}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return 0


def machine() -> dict[str, str]:
    """Describe where and what was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{os.cpu_count()} x {cpu}",
        "memory": format_size(memory),
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hobbit": hobbit.__version__,
        "llama-cpp-python": llama_cpp.__version__,
    }


def commit() -> str:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    comparison = COMPARISONS[name]
    file, _, make = MODELS[comparison.model]
    model = options.models_dir / file
    if not model.exists():
        say(f"writing {model}")
        make(model)
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
    command = [sys.executable, str(HERE / "first_light_arm.py"), json.dumps(job)]
    if not cap:
        return parse_run(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False))
    drop_from_page_cache(model)
    with MemoryGroup(cap) as group:
        result = parse_run(group.run(command))
        return result | {"peak_bytes": group.peak_bytes}


def parse_run(done: subprocess.CompletedProcess[str]) -> Run:
    if done.returncode != 0:
        reason = (
            "the memory cap killed it" if done.returncode == -9 else f"exit code {done.returncode}"
        )
        raise HobbitError(f"an arm failed ({reason}): {' '.join(done.args)}")
    result: Run = json.loads(done.stdout)
    return result


def drop_from_page_cache(path: Path) -> None:
    """Pages that another process brought in would not count against the cap."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages are not dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_rate(path: Path) -> float:
    """Read the whole file past the page cache, return bytes a second.

    Also levels the ground: what the disk caches of the file, it caches for both arms.
    """
    with mmap.mmap(-1, 8 * MIB) as buffer:  # page-aligned, as direct reads demand
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            start, offset = time.perf_counter(), 0
            while count := os.preadv(fd, [buffer], offset):
                offset += count
                if count % mmap.PAGESIZE:
                    break  # the end of the file
            return offset / (time.perf_counter() - start)
        finally:
            os.close(fd)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The table


def table(report: dict[str, Any]) -> Iterable[str]:
    about = report["machine"]
    yield f"{about['cpu']}, {about['memory']}, {about['system']}; {about['date']},"
    versions = f"hobbit {about['hobbit']}, llama-cpp-python {about['llama-cpp-python']}"
    yield f"commit {about['commit']}, {versions}"
    for name, result in report["comparisons"].items():
        comparison = COMPARISONS[name]
        count = len(result["runs"]["stock"])
        yield ""
        cap = f" at {format_size(result['cap_bytes'])}" if comparison.capped else ""
        disk = f"{result['disk_bytes_s'] / MIB:.0f} MiB/s"
        yield f"{comparison.title}{cap}; {count} runs of each arm, median (range); disk {disk}"
        yield ""
        yield "| | stock | hobbit | hobbit/stock | wanted |"
        yield "|---|---|---|---|---|"
        for cells in rows(comparison, result):
            yield f"| {' | '.join(cells)} |"


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
        *spread(stock, ours, "load_s"),
        "",
        verdict(middle(ours, "load_s"), read_s + 1),
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
    met = "met" if ratio >= least else "MISSED"
    return (label, *spread(stock, ours, key), f"{ratio:.2f}", f"{least:g} or more: {met}")


def size_row(
    label: str, stock: list[Run], ours: list[Run], key: str, limit: int
) -> tuple[str, ...]:
    if any(run.get(key) is None for run in stock + ours):
        return (label, "not told by this kernel", "", "", "")
    highest = max(run[key] for run in ours)
    wanted = verdict(highest / MIB, limit / MIB) if limit else ""
    return (label, *spread(stock, ours, key, MIB), "", wanted)


def verdict(value: float, limit: float) -> str:
    return f"{limit:.1f} or less: {'met' if value <= limit else 'MISSED'}"


def spread(stock: list[Run], ours: list[Run], key: str, unit: float = 1) -> tuple[str, str]:
    """Return each arm's median and range as text."""

    def text(runs: list[Run]) -> str:
        values = [run[key] / unit for run in runs]
        digits = 0 if unit > 1 else 2
        low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
        return f"{statistics.median(values):.{digits}f} ({low}-{high})"

    return text(stock), text(ours)


def middle(runs: list[Run], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
