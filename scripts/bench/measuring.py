"""What the comparisons share: the models, the ground that is levelled, and numbers as text."""

from __future__ import annotations

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

import hobbit
from hobbit import demo
from hobbit.cpus import cpu_name
from hobbit.errors import HobbitError
from hobbit.sizes import format_size, parse_size

HERE = Path(__file__).parent
MODELS_DIR = demo.path().parent / "bench"
TEXT = HERE / "text.txt"
TEXT_HELP = "what the demo reads (default: the Declaration of Independence, public domain)"
MIB = 1 << 20
Run = dict[str, Any]


@dataclass(frozen=True)
class BenchModel:
    """A model to measure with; `make` writes it."""

    file: str
    title: str
    make: Callable[[Path], object]

    def path_in(self, folder: Path) -> Path:
        """Return where it is in this folder, written first when it is absent."""
        path = folder / self.file
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            say(f"writing {path}")
            self.make(path)
        return path


def olmoe(kind: str) -> BenchModel:
    """Describe a model of OLMoE-1B-7B's shape with random experts of this type."""
    name = "olmoe-1b-7b"
    shape, type_ = benchmodels.SHAPES[name], benchmodels.SYNTHETIC_TYPES[kind]
    return BenchModel(
        f"{name}-{kind}.gguf",
        f"OLMoE-1B-7B shape {kind}, random tokens",
        lambda path: benchmodels.synthesize(name, shape, type_, path),
    )


def inflated_demo() -> BenchModel:
    """Describe the demo with its experts grown to 4 GiB."""
    return BenchModel(
        f"{demo.path().stem}-4G.gguf",  # names the demo's version
        "demo inflated to 4 GiB, English text",
        lambda path: benchmodels.inflate(demo.ensure(), path, parse_size("4G")),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Where and on what


def machine() -> dict[str, str]:
    """Describe where and what was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{os.cpu_count()} x {cpu_name()}",
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


def about(machine: dict[str, str]) -> list[str]:
    """Say it in two lines."""
    versions = f"hobbit {machine['hobbit']}, llama-cpp-python {machine['llama-cpp-python']}"
    return [
        f"{machine['cpu']}, {machine['memory']}, {machine['system']}; {machine['date']},",
        f"commit {machine['commit']}, {versions}",
    ]


# Running an arm


def arm_command(program: str, job: dict[str, Any]) -> list[str]:
    """Return what runs one arm in a process of its own."""
    return [sys.executable, str(HERE / program), json.dumps(job)]


def run_uncapped(command: Sequence[str]) -> Run:
    return parse_run(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False))


def parse_run(done: subprocess.CompletedProcess[str]) -> Run:
    if done.returncode != 0:
        reason = (
            "the memory cap killed it" if done.returncode == -9 else f"exit code {done.returncode}"
        )
        raise HobbitError(f"an arm failed ({reason}): {' '.join(done.args)}")
    result: Run = json.loads(done.stdout)
    return result


def read_rate(path: Path) -> float:
    """Read the whole file past the page cache, return bytes a second.

    Also levels the ground: what the disk caches of the file, it caches for all arms.
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


# Numbers as text


def middle(runs: Sequence[Run], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def spread(runs: Sequence[Run], key: str, unit: float = 1) -> str:
    """Return the median and the range as text."""
    values = [run[key] / unit for run in runs]
    digits = 0 if unit > 1 else 2
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return f"{statistics.median(values):.{digits}f} ({low}-{high})"


def at_least(value: float, limit: float) -> str:
    return f"{limit:g} or more: {'met' if value >= limit else 'MISSED'}"


def at_most(value: float, limit: float, digits: int = 1) -> str:
    return f"{limit:.{digits}f} or less: {'met' if value <= limit else 'MISSED'}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table whose first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{'---|' * len(rows[0])}", *body]


def free_stem(folder: Path, date: str) -> Path:
    """Return a name that no report of the day has yet."""
    number = 1
    while (folder / f"{date}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return folder / (f"{date}-{number}" if number > 1 else date)


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write what is known so far: a long run that is cut short has not been in vain."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def answered(name: str, work: Callable[[], Iterable[object]]) -> int:
    """Print what comes of the work as it comes, or in one line why not; return the exit status."""
    try:
        for line in work():
            print(line, flush=True)
    except (HobbitError, OSError) as exc:
        print(f"{name}: {' '.join(str(exc).split())}", file=sys.stderr)
        return getattr(exc, "exit_code", 1)
    return 0
