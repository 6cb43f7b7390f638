"""The decode rate of each mode on a large model under a memory cap, and of exact.

An arm is a mode (exact, high, balanced, fast), nested:MODE on a nested copy, or resident:MODE at
--resident-memory with every low copy resident (resident:exact: exact at that cap).

The rules: the inflated demo computes what the demo does, so it gets what the demo's calibration
gives for its modes. Random weights have no KL that means anything: OLMoE's shape gets quantiles of
s, for balanced those of HOBBIT (of all pairs 67 % high, 30 % low, 3 % skipped), for high and fast
half and twice as many that are not high. --rule overrides both.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    MIB,
    MODELS_DIR,
    TEXT,
    TEXT_HELP,
    BenchModel,
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
    save,
    say,
    spread,
)

from hobbit import demo
from hobbit.calibration import BUDGETS, Calibration, rule_for
from hobbit.cgroup import MemoryGroup
from hobbit.disk import drop_from_page_cache
from hobbit.errors import ModelError, UsageError
from hobbit.gguf_file import open_gguf
from hobbit.layout import Layout, build_layout
from hobbit.low_file import IMATRIX, find_low, low_path
from hobbit.modes import companions, mode
from hobbit.prepare import prepare
from hobbit.quality import ROOMY
from hobbit.report import words
from hobbit.rule import EXACT, Rule
from hobbit.search import threshold
from hobbit.sizes import format_size, parse_size

MODELS: dict[str, BenchModel] = {"demo": inflated_demo(), "olmoe": olmoe("Q8_0")}
# How a missing low copy is made: type and importance.
LOW = {"demo": ("iq4_nl", "uniform"), "olmoe": ("q4_0", "none")}
# Of all pairs, the shares that are not high and that are skipped: see above.
SHARES = {"high": (0.165, 0.0), "balanced": (0.33, 0.03), "fast": (0.66, 0.06)}
MODES = ("exact", *BUDGETS)
LEAST = {"balanced": 1.3, "fast": 1.6}
MOST_P99 = 1.3  # of the median, with the low copies resident
PROBED = 32  # tokens whose scores decide quantiles


@dataclass(frozen=True)
class Arm:
    """One arm; `place` is "", "nested" or "resident"."""

    name: str
    place: str
    mode: str

    @classmethod
    def parse(cls, name: str) -> Arm:
        place, _, mode = name.rpartition(":")
        if mode not in MODES or place not in ("", "nested", "resident"):
            raise UsageError(f"{name}: an arm is {', '.join(MODES)}, nested:MODE or resident:MODE")
        return cls(name, place, mode)

    @property
    def against(self) -> str:
        """The arm that it is compared with."""
        return "resident:exact" if self.place == "resident" else "exact"


@dataclass(frozen=True)
class Files:
    model: Path
    low: Path
    nested: Path | None
    text: str  # or "" for random tokens

    @property
    def all(self) -> list[Path]:
        return [path for path in (self.model, self.low, self.nested) if path is not None]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", choices=MODELS)
    add("--runs", type=int, help="runs of each arm (default: 3)")
    add("--tokens", type=int, help="tokens timed in each run (default: 96)")
    add("--warm-up", type=int, help="tokens before those (default: 48)")
    add("--memory", default="55%", help="the cap: a size, a share of the model, or 0 for none")
    add("--read-bps", metavar="SIZE", help="pin the disk to so many bytes a second, as 500M")
    add("--arms", nargs="+", metavar="ARM", help="default: all modes, and as the next two say")
    add("--nested", type=Path, metavar="FILE", help="a nested copy; adds nested arms")
    add("--resident-low", action="store_true", help="adds resident:exact and resident:fast")
    add("--resident-memory", default="75%", help="cap of the resident arms (default: 75%%)")
    add("--rule", action="append", default=[], metavar="NAME=T1:T2[:PATIENCE]", help="of a mode")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--text", type=Path, default=TEXT, help=TEXT_HELP)
    add("--models-dir", type=Path, default=MODELS_DIR)
    add("--model-file", type=Path, help="this file in place of the model's own")
    add("--low-file", type=Path, help="its low copy (default: what prepare made, or makes now)")
    add("--json", type=Path, metavar="FILE", help="write every run there too")
    add("--quick", action="store_true", help="tiny amounts: only whether it works")


def run(options: argparse.Namespace) -> Iterator[str]:
    arms = arms_of(options)
    overrides = overrides_of(options.rule)
    files = prepared(options)
    size = files.model.stat().st_size
    caps = {place: cap_of(text, size) for place, text in caps_asked(options).items()}
    for path in files.all[1:]:
        read_rate(path)  # levels the ground
    report: dict[str, Any] = {
        "machine": machine(),
        "model": options.model,
        "file": str(files.model),
        "size_bytes": size,
        "low": low_words(files.low),
        "cap_bytes": caps[""],
        "resident_cap_bytes": caps["resident"],
        "read_bps": parse_size(options.read_bps) if options.read_bps else 0,
        "disk_bytes_s": read_rate(files.model),
    }
    asked = [arm.mode for arm in arms]
    rules, source = rules_of(options, asked, overrides, files, caps[""])
    report |= {
        "rules": {name: asdict(rule) | {"words": words(rule)} for name, rule in rules.items()},
        "rules_from": source,
        "runs": {arm.name: [] for arm in arms},
    }
    say(f"{options.model}: {source}")
    n_runs = amount(options, "runs", 3, 1)
    for index in range(n_runs):
        for arm in arms:
            result = run_arm(arm, rules[arm.mode], files, index, options, report)
            report["runs"][arm.name].append(result)
            rate, mib = result["tok_s"], result["bytes_per_token"] / MIB
            say(f"  run {index + 1} {arm.name}: {rate:.2f} tok/s, {mib:.1f} MiB/token")
            save(report, options.json)
    return table(report)


def amount(options: argparse.Namespace, name: str, usual: int, quick: int) -> int:
    return int(getattr(options, name) or (quick if options.quick else usual))


def arms_of(options: argparse.Namespace) -> list[Arm]:
    names = options.arms or [
        *MODES,
        *(["nested:exact", "nested:balanced", "nested:fast"] if options.nested else []),
        *(["resident:exact", "resident:fast"] if options.resident_low else []),
    ]
    arms = [Arm.parse(name) for name in dict.fromkeys(names)]
    if any(arm.place == "nested" for arm in arms) and options.nested is None:
        raise UsageError("nested:MODE needs --nested FILE")
    return arms


def overrides_of(given: Sequence[str]) -> dict[str, Rule]:
    """Read NAME=RULE, where a rule is one in the words of `hobbit eval --mode`."""
    found = {}
    for text in given:
        name, equals, rule = text.partition("=")
        if not equals or name not in BUDGETS:
            raise UsageError(f"--rule {text}: must be NAME=T1:T2[:PATIENCE], as fast=0.6:0.9")
        found[name] = mode(rule, None, "demo")[1]
    return found


def caps_asked(options: argparse.Namespace) -> dict[str, str]:
    return {"": options.memory, "resident": options.resident_memory}


def cap_of(text: str, size: int) -> int:
    """Return a cap in bytes: a size, or a share of the model's."""
    if not text.endswith("%"):
        return parse_size(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        raise UsageError(f"{text}: is no share of the model") from None
    return int(share * size)


def prepared(options: argparse.Namespace) -> Files:
    """Return the files, made if they are missing."""
    model = options.model_file or MODELS[options.model].path_in(options.models_dir)
    gguf = open_gguf(model)
    low = options.low_file or find_low(gguf)
    if low is None:
        low = low_path(gguf)
        kind, imatrix = LOW[options.model]
        say(f"making {low}: {kind}, importance {imatrix}")
        made = prepare(build_layout(gguf), low, kind, imatrix, progress=progress())
        if made:
            say(f"made at {made.mb_per_s:.0f} MB/s of the source's experts, {made.seconds:.0f} s")
    text = str(options.text) if options.model == "demo" else ""
    return Files(model, low, options.nested, text)


def progress() -> Any:
    last = [-1]

    def report(stage: str, done: float, told: str) -> None:
        if int(10 * done) > last[0]:
            last[0] = int(10 * done)
            say(f"  {stage} {done:.0%} {told}")

    return report


def low_words(low: Path) -> str:
    """Say what a low copy is."""
    gguf = open_gguf(low)
    kinds = sorted({gguf.tensors[name].type_name for name in build_layout(gguf).streamed})
    return f"{' and '.join(kinds)}, importance {gguf.get(IMATRIX, 'unknown')}"


# The rules


def rules_of(
    options: argparse.Namespace,
    asked: Sequence[str],
    overrides: dict[str, Rule],
    files: Files,
    cap: int,
) -> tuple[dict[str, Rule], str]:
    """Return the rule of each mode asked for, and where the rules are from."""
    rules = {"exact": EXACT} | overrides
    missing = [name for name in dict.fromkeys(asked) if name not in rules]
    by_hand = f"by hand: {', '.join(overrides)}" if overrides else ""
    if not missing:
        return rules, by_hand or "exact only"
    say("probing: scores, and the share of the experts that has room")
    probe = run_in_group(probe_job(options, files, cap), files, cap, 0)
    layout = build_layout(open_gguf(files.model))
    if options.model == "demo":
        found, source = calibrated_rules(missing, probe["cached_share"])
    else:
        found = {name: quantile_rule(name, layout, probe["histogram"]) for name in missing}
        shares = ", ".join(f"{name} {hobbit_words(*SHARES[name])}" for name in missing)
        source = (
            "random weights, no KL means anything: T1 and T2 are quantiles of s over "
            f"{probed(options)} tokens, of all pairs high/low/skipped: {shares} "
            "(67/30/3 is HOBBIT's)"
        )
    return rules | found, "; ".join(filter(None, [source, by_hand]))


def calibrated_rules(names: Sequence[str], cached_share: float) -> tuple[dict[str, Rule], str]:
    """Return what the demo's calibration gives for these modes with so much room."""
    source = demo.ensure()
    _, known = companions(open_gguf(source), None)
    if known is None:
        raise ModelError("the demo is not calibrated: run hobbit prepare demo, or give --rule")
    roomy = cached_share >= ROOMY
    rules = {name: rule_for(known, name, roomy=roomy) for name in names}
    return rules, calibrated_words(known, cached_share, roomy)


def calibrated_words(known: Calibration, cached_share: float, roomy: bool) -> str:
    what = "with half of the experts cached" if roomy else "whatever is cached"
    return (
        f"rules of the demo's calibration (its low copy {known.low_type}) for the budgets "
        f"{what}; here {cached_share:.0%} of the experts have room"
    )


def quantile_rule(name: str, layout: Layout, histogram: Sequence[int]) -> Rule:
    """Return the rule under which these shares of all pairs are low and skipped."""
    counts = np.array(histogram, np.int64)
    used = layout.n_expert_used
    # A token's top expert has no place in the histogram: s is 0.
    lower, skipped = (min(share * used / (used - 1), 1.0) for share in SHARES[name])
    t2 = threshold(counts, skipped) if skipped else 1.0
    return Rule(min(threshold(counts, lower), t2), t2)


def hobbit_words(lower: float, skipped: float) -> str:
    shares = (1 - lower, lower - skipped, skipped)
    return "/".join(f"{100 * share:.3g}" for share in shares)


# Running


def base_job(options: argparse.Namespace, files: Files) -> dict[str, Any]:
    return {
        "model": str(files.model),
        "low": str(files.low),
        "threads": options.threads,
        "text": files.text,
        "seed": 0,
    }


def probed(options: argparse.Namespace) -> int:
    return 8 if options.quick else PROBED


def probe_job(options: argparse.Namespace, files: Files, cap: int) -> dict[str, Any]:
    """Decode with the low copies' slots in the plan, though exact: as much room as lossy modes."""
    return base_job(options, files) | {
        "memory": cap,
        "warm_up": 2,
        "decode": probed(options),
        "rule": asdict(EXACT),
        "observe": True,
    }


def run_arm(
    arm: Arm,
    rule: Rule,
    files: Files,
    index: int,
    options: argparse.Namespace,
    report: dict[str, Any],
) -> Run:
    resident = arm.place == "resident"
    cap = report["resident_cap_bytes" if resident else "cap_bytes"]
    job = base_job(options, files) | {
        "memory": cap,
        "seed": index,
        "warm_up": amount(options, "warm_up", 48, 2),
        "decode": amount(options, "tokens", 96, 4),
        "rule": asdict(rule),
        "resident_low": "on" if resident and rule != EXACT else "off",
    }
    if arm.place == "nested":
        job |= {"model": str(files.nested), "low": ""}
    elif not rule.needs_low:
        job["low"] = ""  # exact, as whoever asks for exact runs it
    return run_in_group(job, files, cap, report["read_bps"])


def run_in_group(job: dict[str, Any], files: Files, cap: int, read_bps: int) -> Run:
    """Run an arm with nothing of the models in the page cache, in a cgroup if there is a cap."""
    command = arm_command("quality_arm.py", job)
    if not cap:
        if read_bps:
            raise UsageError("--read-bps is for a capped run")
        return run_uncapped(command)
    for path in files.all:
        drop_from_page_cache(path)
    with MemoryGroup(cap, read_bps, files.model) as group:
        return parse_run(group.run(command)) | {"peak_bytes": group.peak_bytes}


# The table


def table(report: dict[str, Any]) -> Iterator[str]:
    runs: dict[str, list[Run]] = report["runs"]
    yield from about(report["machine"])
    yield ""
    yield f"{MODELS[report['model']].title}, {format_size(report['size_bytes'])}"
    yield f"low copy: {report['low']}; {report['rules_from']}"
    for name in dict.fromkeys(Arm.parse(arm).mode for arm in runs):
        yield f"{name}: {report['rules'][name]['words']}"
    disk = f"{report['disk_bytes_s'] / MIB:.0f} MiB/s"
    if report["read_bps"]:
        disk += f", pinned to {report['read_bps'] / MIB:.0f} MiB/s"
    cap = format_size(report["cap_bytes"]) if report["cap_bytes"] else "no cap"
    count, n_tokens = len(next(iter(runs.values()))), len(next(iter(runs.values()))[0]["seconds"])
    yield f"{cap}; disk {disk}; {count} runs of {n_tokens} tokens, median (range)"
    yield ""
    head = (
        "", "decode tok/s", "x exact", "wanted", "MiB/token", "high", "low", "skip", "hits",
        "cached", "peak MiB",
    )  # fmt: skip
    yield from markdown([head, *(speed_row(Arm.parse(name), runs) for name in runs)])
    yield ""
    times = ("token time", "median ms", "p99 ms", "p99/median", "wanted")
    yield from markdown([times, *(time_row(Arm.parse(name), report) for name in runs)])


def speed_row(arm: Arm, runs: dict[str, list[Run]]) -> tuple[str, ...]:
    ours, against = runs[arm.name], runs.get(arm.against)
    ratio, wanted = "", ""
    if against and arm.name != arm.against:
        x = middle(ours, "tok_s") / middle(against, "tok_s")
        ratio = f"{x:.2f}"
        if arm.place == "" and arm.mode in LEAST:
            wanted = at_least(x, LEAST[arm.mode])
    shares = [f"{middle(ours, key):.1%}" for key in ("high", "low", "skipped", "hit_rate")]
    cached = "low resident" if ours[0]["low_is_resident"] else f"{ours[0]['cached_share']:.0%}"
    peak = max(run["peak_rss_bytes"] for run in ours) / MIB
    mib = f"{middle(ours, 'bytes_per_token') / MIB:.1f}"
    return (arm.name, spread(ours, "tok_s"), ratio, wanted, mib, *shares, cached, f"{peak:.0f}")


def token_times(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the median and the 99th percentile of all tokens' times, in seconds."""
    seconds = np.concatenate([run["seconds"] for run in runs])
    return float(np.median(seconds)), float(np.quantile(seconds, 0.99))


def time_row(arm: Arm, report: dict[str, Any]) -> tuple[str, ...]:
    median, p99 = token_times(report["runs"][arm.name])
    wanted = ""
    if arm.place == "resident":
        wanted = (
            f"above {MOST_P99:g}" if arm.mode == "exact" else at_most(p99 / median, MOST_P99, 2)
        )
    return (arm.name, f"{1e3 * median:.1f}", f"{1e3 * p99:.1f}", f"{p99 / median:.2f}", wanted)
