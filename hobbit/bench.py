"""`hobbit bench`: arms, each run a process of its own, alternating, under limits.

What is measured of a run is in bench_arm, what is made of it in bench_rows.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any, Literal

from . import errors
from .cgroup import Group, limited
from .disk import drop_from_page_cache
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
# What the disk is read in for a model without experts.
_DENSE_READ = 1 << 20
_RESIDENT = "resident"
_FOLDER = Path(__file__).parent
# What a child executes. An arm is run by its path: as a module it would import the package.
_ARM = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_PROBE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hobbit.disk import probe
print(probe(Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]).bytes_per_s)
"""
_READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hobbit.disk import keep_reading
keep_reading(Path(sys.argv[2]), [int(size) for size in sys.argv[4:]], float(sys.argv[3]))
"""


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

    `arguments` are those of its Llama that make the arm; a rule is given as its fields, and stock
    has `n_cpu_moe` besides, llama.cpp's layers whose experts stay off the GPU. `cap` is
    the memory of its process in bytes, page cache included; 0: none. `less` are amounts of a case
    that this arm does less of, as a slow one has to: its rows say so.
    """

    name: str
    engine: Literal["hobbit", "stock-mmap", "stock"] = "hobbit"
    arguments: dict[str, Any] = field(default_factory=dict)
    cap: int = 0
    less: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name, with what else tells it from other arms of that name."""
        own = [self.arguments[key] for key in ("policy", "predict") if key in self.arguments]
        keys = [key for key in ("device", "rpc", "vram", "dispatch") if key in self.arguments]
        there = " ".join(str(self.arguments[key]) for key in keys)
        return ", ".join([self.name, *own, *([there] if there else [])])

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
    interference: bool = False
    delay_s: float = 0.0
    low: tuple[Path, ...] = ()  # files that are read besides the model's

    @property
    def model(self) -> Path:
        return self.layout.gguf.parts[0].path

    @property
    def files(self) -> list[Path]:
        return [*(part.path for part in self.layout.gguf.parts), *self.low]

    @property
    def piece_bytes(self) -> list[int]:
        """What the disk's rate is measured with: the matrices of the largest expert."""
        groups = [[m.plane_bytes or m.expert_bytes for m in g.matrices] for g in self.layout.groups]
        return max(groups, key=sum, default=[_DENSE_READ])


@dataclass(frozen=True)
class Measured:
    """The samples of an arm in a case, one a repetition, with what its roofline needs.

    `resident` are those of the arm that has everything in memory; empty if it cannot have.
    `interfered` are of the same arm, beside a process that reads what this arm missed.
    `disk_bytes_s` is the disk's rate, right before each repetition.
    """

    setup: Setup
    case: Case
    arm: Arm
    samples: list[Sample] = field(default_factory=list)
    resident: list[Sample] = field(default_factory=list)
    interfered: list[Sample] = field(default_factory=list)
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
        ours = [
            Measured(setup, arm.case(case), arm, resident=all_resident, disk_bytes_s=disk)
            for arm in setup.arms
        ]
        reference = Measured(setup, case, resident, all_resident) if resident else None
        for index in range(setup.repetitions):
            disk.append(disk_rate(setup))
            for one in [*ours, *([reference] if reference else [])]:
                time.sleep(setup.delay_s)
                one.samples.append(run_arm(setup, one.case, one.arm, index))
                say(f"run {index + 1}/{setup.repetitions} {one.arm.title}: {_told(one)}")
            if reference and all_resident[-1].get("plan") == "streamed":
                say(f"no roofline: {_too_big(setup)}")
                all_resident.clear()
                resident = reference = None
            if reference and setup.interference:
                for one in ours:
                    _interfere(one, reference, index)
                    say(f"run {index + 1}/{setup.repetitions} {_RESIDENT} beside {one.arm.title}")
        found.append(ours)
    return found


def _interfere(one: Measured, reference: Measured, index: int) -> None:
    """Run the resident arm while what this arm missed is read, as fast as it was."""
    if one.arm.engine != "hobbit":
        return
    counted = one.samples[-1]["decode" if one.case.n_gen else "prompt"]
    missed = counted["read_bytes"] - counted["ahead_wasted_bytes"]
    with _reads(one.setup, missed / sum(counted["seconds"])):
        one.interfered.append(run_arm(one.setup, reference.case, reference.arm, index))


@contextmanager
def _reads(setup: Setup, bytes_per_s: float) -> Iterator[None]:
    """While it lasts, another process reads the model's file at this rate."""
    if bytes_per_s <= 0:
        yield
        return
    arguments = [_FOLDER.parent, setup.model, bytes_per_s, *setup.piece_bytes]
    command = [sys.executable, "-c", _READER, *map(str, arguments)]
    with Popen(command, stderr=PIPE, text=True) as process:
        try:
            yield
            if process.poll() is not None:
                told = _last(process.communicate()[1])
                raise HobbitError(f"{setup.model}: the reads beside the run ended: {told}")
        finally:
            process.kill()


def _resident_arm(setup: Setup, say: Callable[[str], None]) -> Arm | None:
    """Return the arm that a roofline's computing time is measured with, if the model fits."""
    if setup.layout.gguf.nbytes > resolve_cap("auto").bytes:
        say(f"no roofline: {_too_big(setup)}")
        return None
    number = setup.layout.n_expert_used if setup.layout.other_number else None
    return Arm(_RESIDENT, arguments={} if number is None else {"n_expert_used": number})


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
    cap = {"memory": arm.cap or "auto"} if arm.engine == "hobbit" else {}
    arguments = cap | arm.arguments
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
        done = _run(group, _ARM, str(_FOLDER / "bench_arm.py"), json.dumps(job))
        return _sample(arm, done) | {"peak_bytes": group.peak_bytes}


def disk_rate(setup: Setup) -> float:
    """Return bytes a second that reads of whole experts get from the model's disk.

    In a process with the arms' read limit. Raises CapUnavailable if nothing holds the limit.
    """
    with limited(0, setup.read_bps, setup.model) as group:
        done = _run(group, _PROBE, str(_FOLDER.parent), str(setup.model), *setup.piece_bytes)
    try:
        rate = float(done.stdout)
    except ValueError:
        told = _last(done.stderr)
        raise HobbitError(f"{setup.model}: the disk's rate is not known: {told}") from None
    if setup.read_bps and rate > _LEAK * setup.read_bps:
        raise CapUnavailable(
            f"reads come at {rate / 1e6:.0f} MB/s in spite of the limit of "
            f"{setup.read_bps / 1e6:.0f} MB/s: this system does not let the io controller hold "
            "it; run this as root, or without --read-bps"
        )
    return rate


def _run(group: Group, code: str, *arguments: str | int) -> CompletedProcess[str]:
    return group.run([sys.executable, "-c", code, *map(str, arguments)], stderr=PIPE)


def _sample(arm: Arm, done: CompletedProcess[str]) -> Sample:
    """Read what an arm's process said, or raise what went wrong."""
    sample: Sample = {}
    with suppress(ValueError):
        sample = json.loads(done.stdout)
    if "error" in sample:
        kind = getattr(errors, sample["kind"], HobbitError)
        raise kind(f"{arm.title}: {sample['error']}")
    if done.returncode == -signal.SIGKILL:
        where = f"its memory cap of {format_size(arm.cap)}" if arm.cap else "the system"
        raise PlanError(f"{arm.title}: killed by {where}: it needs more memory than that")
    if done.returncode or not sample:
        told = _last(done.stderr)
        raise HobbitError(f"{arm.title}: its process ended with {done.returncode}: {told}")
    return sample


def _last(told: str | None) -> str:
    return ((told or "").strip().splitlines() or ["without a word"])[-1]
