"""`hobbit bench`: arms, each run a process of its own, alternating, under limits.

What is measured of a run is in bench_arm, what is made of it in bench_rows.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from typing import Any, Literal

from . import errors
from .bench_disk import drop_from_page_cache
from .cgroup import Group, limited
from .errors import CapUnavailable, HobbitError, PlanError
from .gguf_file import GGUF, padded
from .layout import Layout
from .memory import resolve_cap
from .sizes import format_size

Sample = dict[str, Any]
Test = Literal["pp", "tg", "pg"]

# Tokens decoded before those that are timed, in a warm run.
WARM_UP = 8
# A measured rate this far above the read limit says that nothing limits.
_LEAK = 1.5
_LARGEST_READ = 8 << 20
_RESIDENT = "resident"


@dataclass(frozen=True)
class Case:
    """What one process does: `n_depth` tokens, a prompt, then decoding; `tests` are told of it."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    tests: tuple[Test, ...] = ("pp", "tg")
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    # The arguments of the Llama of every arm that follow from the types.
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> dict[str, Any]:
        """The arguments of every arm's Llama."""
        return {
            "n_ctx": padded(self.n_depth + self.n_prompt + self.n_gen, 256),
            "n_batch": self.n_batch,
            "n_ubatch": self.n_ubatch,
            "n_threads": self.n_threads,
            "n_threads_batch": self.n_threads,
            **self.cache,
        }


@dataclass(frozen=True)
class Arm:
    """What is compared.

    `arguments` are those of hobbit.Llama that make the arm; a rule is given as its fields. `cap` is
    the memory of its process in bytes, page cache included; 0: none. `less` are amounts of a case
    that this arm does less of, as a slow one has to: its rows say so.
    """

    name: str
    engine: Literal["hobbit", "stock-mmap", "stock"] = "hobbit"
    arguments: dict[str, Any] = field(default_factory=dict)
    cap: int = 0
    less: dict[str, int] = field(default_factory=dict)

    def case(self, case: Case) -> Case:
        return replace(case, **{n: min(v, getattr(case, n)) for n, v in self.less.items()})


@dataclass(frozen=True)
class Setup:
    """A benchmark of one model. `text` is a file, or "" for random tokens."""

    layout: Layout
    arms: Sequence[Arm]
    cases: Sequence[Case]
    text: str
    repetitions: int = 5
    read_bps: int = 0
    warm: bool = True
    roofline: bool = True
    delay_s: float = 0.0
    low: tuple[Path, ...] = ()  # files that are read besides the model's

    @property
    def model(self) -> Path:
        return self.layout.gguf.parts[0].path

    @property
    def files(self) -> list[Path]:
        return [*(part.path for part in self.layout.gguf.parts), *self.low]

    @property
    def read_bytes(self) -> int:
        """How much a read of the disk's rate takes: what hobbit's take."""
        sizes = [group.expert_bytes for group in self.layout.groups]
        return min(max(sizes, default=1 << 20), _LARGEST_READ)


@dataclass(frozen=True)
class Measured:
    """The samples of an arm in a case, one a repetition, with what its roofline needs.

    `resident` are those of the arm that has everything in memory; empty if it cannot have.
    `disk_bytes_s` is the disk's rate, right before each repetition.
    """

    setup: Setup
    case: Case
    arm: Arm
    samples: list[Sample] = field(default_factory=list)
    resident: list[Sample] = field(default_factory=list)
    disk_bytes_s: list[float] = field(default_factory=list)


def file_bytes(gguf: GGUF) -> int:
    return sum(part.path.stat().st_size for part in gguf.parts)


def measure(setup: Setup, say: Callable[[str], None]) -> list[list[Measured]]:
    """Run everything; tell each run as it ends. Returns the arms of each case."""
    found = []
    resident = _resident_arm(setup, say) if setup.roofline else None
    for case in setup.cases:
        disk: list[float] = []
        all_resident: list[Sample] = []
        ours = [Measured(setup, arm.case(case), arm, [], all_resident, disk) for arm in setup.arms]
        reference = Measured(setup, case, resident, all_resident) if resident else None
        for index in range(setup.repetitions):
            disk.append(disk_rate(setup))
            for one in [*ours, *([reference] if reference else [])]:
                time.sleep(setup.delay_s)
                one.samples.append(run_arm(setup, one.case, one.arm, index))
                say(f"run {index + 1}/{setup.repetitions} {one.arm.name}: {_told(one)}")
            if reference and all_resident[-1].get("plan") == "streamed":
                say(f"no roofline: {_too_big(setup)}")
                all_resident.clear()
                resident = reference = None
        found.append(ours)
    return found


def _resident_arm(setup: Setup, say: Callable[[str], None]) -> Arm | None:
    """Return the arm that a roofline's computing time is measured with, if the model fits."""
    if setup.layout.gguf.nbytes > resolve_cap("auto").bytes:
        say(f"no roofline: {_too_big(setup)}")
        return None
    return Arm(_RESIDENT)


def _too_big(setup: Setup) -> str:
    cap = resolve_cap("auto")
    return (
        f"for the time without reads the whole model, {format_size(setup.layout.gguf.nbytes)}, "
        f"has to fit the memory, {format_size(cap.bytes)} ({cap.reason})"
    )


def _told(one: Measured) -> str:
    sample, words = one.samples[-1], []
    for name in ("prompt", "decode"):
        seconds = sum(sample[name]["seconds"])
        tokens = one.case.n_prompt if name == "prompt" else one.case.n_gen
        if tokens:
            words.append(f"{name} {tokens / seconds:.2f} tok/s")
    return ", ".join(words)


def run_arm(setup: Setup, case: Case, arm: Arm, index: int) -> Sample:
    """Run an arm once; raises the arm's own error, under its name."""
    is_resident = arm.name == _RESIDENT
    warm_up = min(WARM_UP, case.n_gen) if setup.warm else -1
    arguments = {"memory": arm.cap or "auto"} | arm.arguments if arm.engine == "hobbit" else {}
    job = {
        "engine": arm.engine,
        "model": str(setup.model),
        "arguments": arguments,
        "context": case.context,
        "text": setup.text,
        "seed": index,
        "depth": case.n_depth,
        "prompt": case.n_prompt,
        "decode": case.n_gen,
        # All that is timed, so that every expert of it is there.
        "warm_up": case.n_gen if is_resident else warm_up,
    }
    limits = (0, 0) if is_resident else (arm.cap, setup.read_bps)
    if arm.cap or not setup.warm:
        for path in setup.files:
            drop_from_page_cache(path)
    with limited(*limits, setup.model) as group:
        done = _run(group, "bench_arm.py", json.dumps(job))
        return _sample(arm, done) | {"peak_bytes": group.peak_bytes}


def disk_rate(setup: Setup) -> float:
    """Return bytes a second that reads of an expert's size get from the model's disk.

    In a process with the arms' read limit. Raises CapUnavailable if nothing holds the limit.
    """
    with limited(0, setup.read_bps, setup.model) as group:
        done = _run(group, "bench_disk.py", str(setup.model), str(setup.read_bytes))
    try:
        rate = float(done.stdout)
    except ValueError:
        raise HobbitError(f"{setup.model}: the disk's rate is not known: {_last(done)}") from None
    if setup.read_bps and rate > _LEAK * setup.read_bps:
        raise CapUnavailable(
            f"reads come at {rate / 1e6:.0f} MB/s in spite of the limit of "
            f"{setup.read_bps / 1e6:.0f} MB/s: this system does not let the io controller hold "
            "it; run this as root, or without --read-bps"
        )
    return rate


def _run(group: Group, script: str, *arguments: str) -> CompletedProcess[str]:
    """Run a file of ours by its path: as a module it would import the package."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    path = str(Path(__file__).with_name(script))
    return group.run([sys.executable, "-c", code, path, *arguments], stderr=PIPE)


def _sample(arm: Arm, done: CompletedProcess[str]) -> Sample:
    """Read what an arm's process said, or raise what went wrong."""
    sample: Sample = {}
    with suppress(ValueError):
        sample = json.loads(done.stdout)
    if "error" in sample:
        kind = getattr(errors, sample["kind"], HobbitError)
        raise kind(f"{arm.name}: {sample['error']}")
    if done.returncode == -signal.SIGKILL:
        where = f"its memory cap of {format_size(arm.cap)}" if arm.cap else "the system"
        raise PlanError(f"{arm.name}: killed by {where}: it needs more memory than that")
    if done.returncode or not sample:
        raise HobbitError(f"{arm.name}: its process ended with {done.returncode}: {_last(done)}")
    return sample


def _last(done: CompletedProcess[str]) -> str:
    return ((done.stderr or "").strip().splitlines() or ["without a word"])[-1]
