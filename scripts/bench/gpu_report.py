"""Check and measure hobbit with a device beside llama.cpp's --n-cpu-moe, and write a dated report.

Gates: every logit against the CPU's, within a tolerance, and tests/test_device_gates.py. Then, with
25 % and 50 % of the model's size as the device's memory, prompt and decoding of llama.cpp, with as
many layers' experts in that memory as fit beside the dense weights, and of hobbit with the dense
weights there and here. Arms alternate, each run a process of its own, all in `hobbit bench`'s way.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import about, answered, free_stem, machine, markdown, save, say

from hobbit import demo
from hobbit.arena import DeviceInfo, plan_arena
from hobbit.bench import Arm, Case, Setup, file_bytes, measure
from hobbit.bench_rows import Row, as_markdown, rows
from hobbit.cpus import physical_cores
from hobbit.devices import names
from hobbit.errors import HobbitError, PlanError, UsageError
from hobbit.gguf_file import open_gguf
from hobbit.layout import Layout, build_layout
from hobbit.planning.offload import offloaded
from hobbit.planning.parts import Context, batch_bytes
from hobbit.sizes import format_size
from hobbit.texts import SAMPLE, path_of

ROOT = Path(__file__).parent.parent.parent
SHARES = (0.25, 0.5)
# Normalised mean squared error of the logits: ggml's own tests allow a product 0.0005.
TOLERANCE = 0.01
# What the project set itself to reach beside llama.cpp: test, least ratio.
TARGETS = {"tg": 1.3, "pp": 1.0}
STOCK, DENSE_THERE, DENSE_HERE = "n-cpu-moe", "dense there", "dense here"
_LOOK_S = 0.2
_PARTS = {
    "compute_s": "the CPU's experts",
    "stall_s": "waiting for reads",
    "device_wait_s": "waiting for the device",
    "manage_s": "the cache",
    "predict_s": "predicting",
    "rest_s": "everything but the experts",
}


@dataclass(frozen=True)
class Place:
    """The device to measure: by ggml's name, or the first of an RPC server."""

    device: str | None
    rpc: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        found = {"device": self.device, "rpc": self.rpc}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def flags(self) -> list[str]:
        return [word for name, value in self.arguments.items() for word in (f"--{name}", value)]


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-report", description=__doc__)
    add = parser.add_argument
    add("--device", metavar="NAME", help="ggml's name of the device (default: the first GPU)")
    add("--rpc", metavar="HOST:PORT", help="the first device of an RPC server")
    add("--model", type=Path, action="append", help="a .gguf file (repeatable; default: the demo)")
    add("--out", type=Path, default=ROOT / "docs" / "gpu", help="(default: docs/gpu)")
    add("--runs", type=int, default=5, help="of each arm (default: 5)")
    add("--prompt", type=int, default=512, help="tokens (default: 512)")
    add("--decode", type=int, default=128, help="tokens (default: 128)")
    add("--text", type=Path, help="what is fed (default: a built-in text); for long prompts")
    add("--random", action="store_true", help="feed random tokens, as models without sense need")
    add("--threads", type=int, default=physical_cores(), help="(default: physical cores)")
    add("--no-tests", action="store_true", help="leave out tests/test_device_gates.py")
    add("--quick", action="store_true", help="one run of each arm with few tokens")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    if options.quick:
        options.runs, options.prompt, options.decode = 1, 32, 8
    return answered("gpu-report", lambda: [run(options)])


def run(options: argparse.Namespace) -> Path:
    """Check and measure everything; return the report's path."""
    place = chosen(options.device, options.rpc)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": machine(),
        "gpu": nvidia("name,driver_version,memory.total"),
        "has_gpu": bool(gpus()),
        "place": place.arguments,
        "tests": None if options.no_tests else device_tests(place),
        "models": [],
    }
    stem = free_stem(options.out, f"REPORT-{report['machine']['date']}")
    for path in options.model or [demo.ensure()]:
        layout = build_layout(open_gguf(path))
        if not layout.groups:
            raise UsageError(f"{path}: has no experts that a device could hold")
        report["models"].append({"name": path.name, "gate": gate(path, layout, place, options)})
        report["models"][-1]["parts"] = []
        for share in SHARES:
            say(f"{path.name}, {share:.0%} of it as the device's memory")
            report["models"][-1]["parts"].append(part(layout, share, place, options))
            save(report, stem.with_suffix(".json"))
    file = stem.with_suffix(".md")
    file.write_text("\n".join(lines(report, stem.name)) + "\n", encoding="utf-8")
    return file


def gpus() -> list[str]:
    """Return what ggml sees besides the CPU and the devices of RPC servers."""
    return [name for name in names() if not name.startswith(("CPU", "RPC"))]


def chosen(device: str | None, rpc: str | None) -> Place:
    """Return the device that is asked for, or else the first that is not the CPU."""
    if device is None and rpc is None:
        there = gpus()
        if not there:
            raise UsageError("this llama.cpp sees no GPU: name another device with --device")
        device = there[0]
    if rpc is None and device not in names():
        raise UsageError(f"there is no device {device}: there is {', '.join(names())}")
    return Place(device, rpc)


# The gates


def gate(path: Path, layout: Layout, place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the logits as `hobbit verify` does, in a process that gives the device back."""
    say(f"{path.name}: logits against the CPU's")
    half = int(file_bytes(layout.gguf) * SHARES[-1])
    vram = max(half, least_vram(layout, 32))
    words = ["verify", str(path), "-t", str(options.threads), "--tolerance", str(TOLERANCE)]
    command = [sys.executable, "-m", "hobbit", *words, *place.flags, "--vram", str(vram)]
    command += ["--dispatch", "split", "-q"]  # whatever is faster, the device has to compute
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise HobbitError(
            f"the gate did not run: {(done.stderr.strip() or 'no word').splitlines()[-1]}"
        )
    return {"passed": done.returncode == 0, "said": done.stdout.splitlines()}


def device_tests(place: Place) -> str:
    """Run the tests of logits on this device; return pytest's last line."""
    say("tests/test_device_gates.py")
    asked = ["--hobbit-device", place.device] if place.rpc is None and place.device else []
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_device_gates.py", *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip() or "no word").splitlines()[-1]


# What is measured


def part(layout: Layout, share: float, place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model with one amount of the device's memory."""
    cap = int(share * file_bytes(layout.gguf))
    # No larger than the prompt: its buffers take of the device's memory.
    ubatch = min(512, max(options.prompt, 1))
    case = Case(options.prompt, options.decode, n_ubatch=ubatch, n_threads=options.threads)
    arms, notes = arms_of(layout, case, cap, place)
    text = "" if options.random else str(options.text or path_of(SAMPLE))
    setup = Setup(layout, arms, [case], text, options.runs, roofline=False)
    with watching() as peaks:

        def told(said: str) -> None:
            say(f"  {said}")
            peaks.told(said)

        found = rows(measure(setup, told))
    shown = [
        row | {key: Path(row[key]).name for key in ("model_filename", "text")} for row in found
    ]
    return {
        "share": share,
        "vram_bytes": cap,
        "notes": notes,
        "rows": shown,
        "vram_peaks": peaks.found,
    }


def arms_of(layout: Layout, case: Case, cap: int, place: Place) -> tuple[list[Arm], list[str]]:
    """Return the arms that have so much of the device's memory, and what there is to say."""
    dense, notes = beside_experts(layout, case), []
    layers = sorted({group.layer for group in layout.groups})
    off = layers_off(layout, cap - dense)
    if off is None:
        notes.append(
            f"the dense weights and the context, {format_size(dense)}, do not fit: llama.cpp "
            "has nothing on the device"
        )
        stock = {"n_gpu_layers": 0}
    else:
        kept = sum(layer >= off for layer in layers)
        notes.append(f"llama.cpp: --n-cpu-moe {off}, the experts of {kept} layers on the device")
        stock = {"n_gpu_layers": 999, "n_cpu_moe": off}
    found = [Arm(STOCK, "stock", stock)]
    least = least_vram(layout, case.n_ubatch)
    for name, vram, on_gpu in ((DENSE_THERE, cap - dense, -1), (DENSE_HERE, cap, 0)):
        if vram < least:
            notes.append(f"hobbit, {name}: {format_size(max(vram, 0))} are too little for experts")
            continue
        own = {"vram": vram, "n_gpu_layers": on_gpu, **place.arguments}
        found.append(Arm(name, arguments=own))
    return found, notes


def beside_experts(layout: Layout, case: Case) -> int:
    """Return the bytes that llama.cpp puts on a GPU besides experts: weights, context, buffers."""
    context = Context(int(case.context["n_ctx"]), case.n_ubatch)
    return offloaded(layout, context, -1, "").bytes


def layers_off(layout: Layout, free: int) -> int | None:
    """Return the least N of --n-cpu-moe with which the other layers' experts fit; None: none."""
    if free < 0:
        return None
    last = max(group.layer for group in layout.groups)
    for off in range(last + 2):
        there = [g for g in layout.groups if g.layer >= off]
        if sum(group.expert_bytes * group.n_expert for group in there) <= free:
            return off
    return None


def least_vram(layout: Layout, n_ubatch: int) -> int:
    """Return the least memory that hobbit takes for experts."""
    try:
        plan_arena(layout, DeviceInfo("", "", False, 0, 0), 1, batch_bytes(layout, n_ubatch), 0)
    except PlanError as error:
        return error.needed_bytes
    return 1


# The memory of a GPU


def nvidia(what: str) -> str:
    """Return what nvidia-smi says of the first GPU; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


class Peaks:
    """The most MiB of the GPU in use during each arm's runs, over what was used before."""

    def __init__(self) -> None:
        self.before = used_mib()
        self.found: dict[str, int] = {}
        self._most = 0

    def look(self) -> None:
        self._most = max(self._most, (used_mib() or 0) - (self.before or 0))

    def told(self, said: str) -> None:
        """Take in `hobbit bench`'s word that an arm's run is over."""
        if self.before is None:
            return
        name = said.partition(" ")[2].partition(" ")[2].partition(":")[0].partition(",")[0]
        self.found[name] = max(self.found.get(name, 0), self._most)
        self._most = 0


def used_mib() -> int | None:
    used = nvidia("memory.used")
    return int(used) if used.isdecimal() else None


@contextlib.contextmanager
def watching() -> Iterator[Peaks]:
    """Look at the GPU's memory again and again, where there is one."""
    peaks, done = Peaks(), threading.Event()

    def looking() -> None:
        while not done.wait(_LOOK_S):
            peaks.look()

    thread = threading.Thread(target=looking)
    if peaks.before is not None:
        thread.start()
    try:
        yield peaks
    finally:
        done.set()
        if peaks.before is not None:
            thread.join()


# The report


def lines(report: Mapping[str, Any], stem: str) -> Iterator[str]:
    yield f"# GPU report {stem.removeprefix('REPORT-')}"
    yield ""
    yield from about(report["machine"])
    yield ""
    yield report["gpu"] or "No NVIDIA GPU."
    if not report["has_gpu"]:
        yield ""
        yield "**A stand-in**: this llama.cpp has no GPU, so all its own work is the CPU's, and the"
        yield "speeds say nothing about any. The tables are those of a run with one."
    yield ""
    yield f"Device: {' '.join(map(str, report['place'].values()))}. Every sample is in"
    yield f"[{stem}.json]({stem}.json); `scripts/bench/gpu_report.py` says how it is measured."
    yield ""
    yield "## Gates"
    yield ""
    yield f"`tests/test_device_gates.py`: {report['tests'] or 'not run'}"
    for model in report["models"]:
        state = "passed" if model["gate"]["passed"] else "**FAILED**"
        yield ""
        yield f"{model['name']}, logits against the CPU's within an NMSE of {TOLERANCE:g}: {state}"
        yield ""
        yield from ["```", *model["gate"]["said"], "```"]
    for model in report["models"]:
        for found in model["parts"]:
            yield from part_lines(model["name"], found)


def part_lines(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    size = format_size(found["vram_bytes"])
    yield f"## {name}, {size} on the device ({found['share']:.0%} of the file)"
    yield ""
    for note in found["notes"]:
        yield f"- {note}"
    for arm, mib in found["vram_peaks"].items():
        yield f"- {arm}: at most {mib} MiB of the GPU in use"
    yield ""
    yield from compared(found["rows"])
    yield ""
    yield as_markdown(found["rows"], breakdown=True).rstrip()


def compared(measured: Sequence[Row]) -> list[str]:
    """Return hobbit's better arm beside llama.cpp, and where its time went."""
    table = [["test", "llama.cpp", "hobbit", "arm", "ratio", "", "most of hobbit's time"]]
    for kind, least in TARGETS.items():
        found = {row["mode"]: row for row in measured if row["test"].startswith(kind)}
        stock = found.pop(STOCK, None)
        if stock is None or not found:
            continue
        best = max(found.values(), key=lambda row: float(row["median_ts"]))
        ratio = best["median_ts"] / stock["median_ts"]
        met = "met" if ratio >= least else "MISSED"
        table.append(
            [
                best["test"],
                f"{stock['median_ts']:.2f} t/s",
                f"{best['median_ts']:.2f} t/s",
                best["mode"],
                f"{ratio:.2f}",
                f"{least:g} or more: {met}",
                most_time(best["breakdown"]),
            ]
        )
    return markdown(table)


def most_time(breakdown: Mapping[str, float | None]) -> str:
    """Say the two largest parts of a token's time."""
    total = breakdown["total_s"] or 1.0
    shares = sorted(((breakdown[part] or 0.0) / total, said) for part, said in _PARTS.items())
    return ", ".join(f"{said} {share:.0%}" for share, said in reversed(shares[-2:]))


if __name__ == "__main__":
    sys.exit(main())
