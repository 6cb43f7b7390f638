"""KL to exact against bytes a token, for our rules and for what they are compared with.

Half of the experts are cached, on text that calibration has not seen, token by token.

The noise row is exact decoded two tokens a step: the model's own numerical noise. The share test
computes half of the pairs low, those with the smaller gate weights, and compares that with the
other half. No rule names the other half; two estimates take the damage of experts to add up: by
difference, KL(all low) - KL(smaller half); by layers, KL(even layers all low) + KL(odd layers all
low) - KL(smaller half). A KL contains exact's own noise, which any change lets loose: the same is
told with it subtracted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measuring import about, at_least, at_most, machine, markdown, save, say

from hobbit import demo, plot
from hobbit.calibration import BUDGETS, Calibration
from hobbit.errors import UnsupportedModelError
from hobbit.evaluate import Row, Sample, comparison, windows
from hobbit.forced import Forced, Logits
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.llama import Llama
from hobbit.modes import check_low, companions, mode
from hobbit.quality import ROOMY
from hobbit.report import eval_lines, words
from hobbit.rule import ALL_LOW, EXACT, Rule
from hobbit.search import Histogram, threshold
from hobbit.sizes import format_size
from hobbit.stats import Stats
from hobbit.texts import read

BATCH = 32
# Shares of the pairs that are not on top.
LOW_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
LOW_AND_SKIP = ((0.25, 0.06), (0.5, 0.06), (0.5, 0.2), (0.75, 0.2), (1.0, 0.2), (1.0, 0.5))
SKIP_SHARES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
PATIENCE = (2, 3, 4, 6, 9, 16)
TOP_PATIENCE = (2, 3, 5, 9)
LAMBDAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)

OURS = ("low", "low and skip", "patience", "patience all high", "modes")
BASELINES = ("skip only", "skip only renormalised", "substitution", "fewer experts", "all low")
FAMILIES = (*OURS, *BASELINES, "share test")
# Rules that --mode adds: those that are like ours count as ours.
MORE_OURS, MORE = "more of ours", "more"
# These must have twice our KL, or more, at equal bytes.
WORSE = ("skip only", "skip only renormalised", "substitution")
LEAST_WORSE = 2.0
RATIOS = (1.25, 1.5, 2.0)
LEAST_FEWER = {"high": 1.15, "balanced": 1.35, "fast": 1.6}
LEAST_SHARE = 4.0
ALL_LOW_WORDS = words(ALL_LOW)
NOISE = "exact, two a step"
SMALLER, EVEN, ODD = "smaller gates low", "even layers low", "odd layers low"


@dataclass(frozen=True)
class Arm:
    family: str
    name: str
    rule: Rule


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-file", type=Path, help="a model (default: the demo)")
    add("--low-file", type=Path, help="its low copy (default: what hobbit prepare made)")
    add("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help=f"of {', '.join(FAMILIES)}")
    add("--mode", action="append", default=[], metavar="MODE", help="more rules: as hobbit eval's")
    add("--tokens", type=int, help="how much of the text (default: 1536)")
    add("--window", type=int, help="tokens of context (default: 256)")
    add("--threads", type=int, default=1, help="default: 1")
    add("--text", type=Path, help="text to judge by (default: the built-in sample)")
    add("--ratio", type=float, nargs="+", default=RATIOS, help="how many times fewer bytes")
    add("--plot", type=Path, metavar="PNG", help="draw the curves there")
    add("--json", type=Path, metavar="FILE", help="write every row there too")
    add("--quick", action="store_true", help="tiny amounts: only whether it works")


def run(options: argparse.Namespace) -> Iterator[str]:
    if options.plot:
        plot.check()
    path = options.model_file or demo.ensure()
    gguf = open_gguf(path)
    low, known = companions(gguf, options.low_file)
    check_low([("all-low", ALL_LOW)], low, str(path))
    families = options.only or [f for f in FAMILIES if f != "modes" or known is not None]
    if known is None:
        say(f"{path}: not calibrated, so that high, balanced and fast are left out")
    layout = build_layout(gguf)
    sample = sample_of(options)
    llm = Llama(
        str(path),
        low=str(low),
        cache_bytes=layout.expert_bytes // 2,
        n_ctx=sample.window,
        n_batch=BATCH,
        n_ubatch=BATCH,
        n_threads=options.threads,
        n_threads_batch=options.threads,
    )
    report: dict[str, Any] = {
        "machine": machine(),
        "file": str(path),
        "low_file": str(low),
        "sample": vars(sample),
        "text": str(options.text or "hobbit's held-out sample"),
        "threads": options.threads,
        "calibrated": known is not None,
        "ratios": list(options.ratio),
        "rows": [],
    }
    with closing(llm):
        report["cached_share"] = llm.plan.cached_share
        report["cache_bytes"] = llm.plan.cache_bytes
        for arm, row in measured(llm, options, sample, families, known):
            say(f"  {arm.family}: {arm.name}: KL {row.kl:.5f}, {row.seconds:.0f} s")
            report["rows"].append(row.to_dict() | {"family": arm.family, "words": words(arm.rule)})
            save(report, options.json)
    if options.plot:
        draw(report, options.plot)
    return table(report)


def sample_of(options: argparse.Namespace) -> Sample:
    usual = Sample(64, 192, warmup=16) if options.quick else Sample()
    return replace(
        usual,
        window=options.window or usual.window,
        limit=options.tokens or usual.limit,
    )


def measured(
    llm: Llama,
    options: argparse.Namespace,
    sample: Sample,
    families: Sequence[str],
    known: Calibration | None,
) -> Iterator[tuple[Arm, Row]]:
    """Measure exact, the noise, and every rule of these families."""
    forced = Forced(llm)
    tokens, bos = forced.tokens(read(options.text)), forced.bos
    model = InPairs(forced, windows(tokens, sample, bos))
    with comparison(model, tokens, sample, bos=bos) as measure:
        with llm.observe() as histogram:
            row = measure("exact", EXACT)
        if llm.stats.unscored:
            raise UnsupportedModelError(f"{llm.model_path}: its gate weights are not seen")
        yield Arm("exact", "exact", EXACT), row
        model.pairs = True
        yield Arm("noise", NOISE, EXACT), measure(NOISE, EXACT)
        model.pairs = False
        roomy = llm.plan.cached_share >= ROOMY
        arms = [
            *rules(histogram, llm.layout.n_expert_used, len(llm.layout.groups), options.quick),
            *(Arm("modes", *mode(name, known, "demo", roomy=roomy)) for name in named(known)),
        ]
        wanted = {*families, *(["all low"] if "share test" in families else [])}
        arms = [arm for arm in arms if arm.family in wanted]
        arms += [more(*mode(word, known, "demo")) for word in options.mode]
        for arm in arms:
            yield arm, measure(arm.name, arm.rule)


def named(known: Calibration | None) -> list[str]:
    """Return the named modes that can be had."""
    return [name for name, point in known.modes().items() if point] if known else []


def more(name: str, rule: Rule) -> Arm:
    ours = rule.needs_low and rule != ALL_LOW and not rule.substitute and not rule.experts
    return Arm(MORE_OURS if ours else MORE, name, rule)


class InPairs:
    """A model that, where `pairs` is set, decodes two tokens a step though it is asked for one.

    It has to know the texts, as `parts`, to look ahead.
    """

    def __init__(self, model: Forced, parts: Sequence[Sequence[int]]) -> None:
        self.pairs = False
        self._model = model
        self._parts = parts
        self._next = 0
        self._at = 0
        self._held: list[Logits] = []

    @property
    def n_vocab(self) -> int:
        return self._model.n_vocab

    @property
    def n_ctx(self) -> int:
        return self._model.n_ctx

    def begin(self, rule: Rule) -> None:
        self._model.begin(rule)
        self._next = 0

    def clear(self) -> None:
        self._model.clear()
        self._next, self._at, self._held = self._next + 1, 0, []

    def keep(self, n: int) -> bool:
        return not self.pairs and self._model.keep(n)

    def decode(self, tokens: Sequence[int], *, logits: bool = True) -> Logits:
        if not self.pairs:
            return self._model.decode(tokens, logits=logits)
        part = self._parts[self._next - 1]
        if [*tokens] != [*part[self._at : self._at + 1]]:
            raise AssertionError("not the token that comes next in the text")
        if not self._held:
            ahead = part[self._at : min(self._at + 2, len(part) - 1)]
            self._held = [*self._model.decode(ahead)]
        self._at += 1
        return self._held.pop(0)[np.newaxis]

    def counters(self) -> Stats:
        return self._model.counters()


# The rules


def rules(histogram: Histogram, n_used: int, n_groups: int, quick: bool) -> Iterator[Arm]:
    """Yield every rule that is not the calibration's; with `quick` two of each family."""

    def at(share: float) -> float:
        return threshold(histogram, share)

    def few(values: Sequence[Any]) -> Sequence[Any]:
        return values[:: len(values) - 1] if quick else values

    seen: set[Rule] = set()

    def new(family: str, name: str, rule: Rule) -> Iterator[Arm]:
        if rule not in seen:  # scores that many pairs share make two thresholds one
            seen.add(rule)
            yield Arm(family, name, rule)

    for x in few(LOW_SHARES):
        yield from new("low", f"{at(x):g}:1", Rule(at(x), 1.0))
    for x, y in few(LOW_AND_SKIP):
        yield from new("low and skip", f"{at(x):g}:{at(y):g}", Rule(at(x), at(y)))
    for patience in few(PATIENCE):
        yield from new("patience", f"0:1:{patience}", Rule(0.0, 1.0, patience=patience))
    for patience in few(TOP_PATIENCE):
        rule = Rule(1.0, 1.0, patience=patience)
        yield from new("patience all high", f"1:1:{patience}", rule)
    for y in few(SKIP_SHARES):
        yield from new("skip only", f"skip-only:{at(y):g}", Rule(at(y), at(y)))
    for y in few(SKIP_SHARES):
        rule, name = Rule(at(y), at(y), renormalise=True), f"skip-only:{at(y):g}, renormalised"
        yield from new("skip only renormalised", name, rule)
    for value in few(LAMBDAS):
        yield from new("substitution", *mode(f"substitute:{value:g}", None, "demo"))
    for count in few(range(n_used - 1, 0, -1)) if n_used > 2 else (1,):
        yield from new("fewer experts", *mode(f"fewer:{count}", None, "demo"))
    yield from new("all low", "all-low", ALL_LOW)
    half = min(0.5 * n_used / (n_used - 1), 1.0)
    layers = [[-1.0 if i % 2 == odd else 1.0 for i in range(n_groups)] for odd in (0, 1)]
    yield from new("share test", SMALLER, Rule(at(half), 1.0, deterministic=True))
    for name, t1 in zip((EVEN, ODD), layers, strict=True):
        yield from new("share test", name, Rule(tuple(t1), 1.0, deterministic=True))


# What follows from the rows

Points = Sequence[tuple[float, float]]


def kl_at(points: Points, target: float) -> float | None:
    """Interpolate log KL at so many bytes a token, on the best of these (bytes, KL) points.

    None outside of what was measured.
    """
    best: list[tuple[float, float]] = []
    for size, kl in sorted(points):
        if not best or kl < best[-1][1]:
            best.append((size, kl))
    if len(best) == 1 and best[0][0] == target:
        return best[0][1]
    for (a, kl_a), (b, kl_b) in pairwise(best):
        if a <= target <= b:
            part = (target - a) / (b - a)
            logs = [math.log(max(kl, 1e-12)) for kl in (kl_a, kl_b)]
            return math.exp((1 - part) * logs[0] + part * logs[1])
    return None


def points_of(report: dict[str, Any], families: Sequence[str]) -> Points:
    """Return bytes and KL of these families' rows; a mode that is all-low is not ours."""
    rows = [
        row
        for row in report["rows"]
        if row["family"] in families and (row["family"] != "modes" or row["words"] != ALL_LOW_WORDS)
    ]
    return [(row["bytes_per_token"], row["kl"]) for row in rows]


def ours_at(report: dict[str, Any], target: float) -> float | None:
    """Return the least KL at so many bytes that a curve of ours has, or one through all of them."""
    ours = (*OURS, MORE_OURS)
    found = [
        kl_at(points_of(report, families), target) for families in (ours, *([f] for f in ours))
    ]
    return min((kl for kl in found if kl is not None), default=None)


def row_of(report: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((row for row in report["rows"] if row["mode"] == name), None)


def measured_families(report: dict[str, Any]) -> list[str]:
    return [*dict.fromkeys(row["family"] for row in report["rows"])]


# The tables


def table(report: dict[str, Any]) -> Iterator[str]:
    yield from about(report["machine"])
    cache = f"cache {format_size(report['cache_bytes'])}"
    yield f"{report['file']}, {cache}: {report['cached_share']:.0%} of the experts have room;"
    s = report["sample"]
    yield f"{report['text']}, {s['limit']} tokens in windows of {s['window']}; exact's noise below"
    yield ""
    yield from eval_lines([row_from(row) for row in report["rows"]])
    for lines in (mode_lines(report), ratio_lines(report), own_lines(report), share_lines(report)):
        found = [*lines]
        if found:
            yield from ("", *found)


def row_from(data: dict[str, Any]) -> Row:
    return Row(**{name: data[name] for name in Row.__dataclass_fields__})


def mode_lines(report: dict[str, Any]) -> Iterator[str]:
    """Hold the named modes to what they promise."""
    rows = [row for row in report["rows"] if row["family"] == "modes"]
    if not rows:
        return
    exact = report["rows"][0]["bytes_per_token"]
    cells = [("mode", "rule", "KL", "wanted", "fewer bytes", "wanted")]
    for row in rows:
        fewer = exact / row["bytes_per_token"]
        wanted = at_most(row["kl"], BUDGETS[row["mode"]], 2)
        least = at_least(fewer, LEAST_FEWER[row["mode"]])
        cells.append(
            (row["mode"], row["words"], f"{row['kl']:.4f}", wanted, f"{fewer:.2f}x", least)
        )
    yield from markdown(cells)


def ratio_lines(report: dict[str, Any]) -> Iterator[str]:
    """Compare the families at equal bytes."""
    exact = report["rows"][0]["bytes_per_token"]
    skipped = ("exact", "noise", "share test", "all low", "modes", MORE, MORE_OURS)
    families = [f for f in measured_families(report) if f not in skipped]
    if not families:
        return
    yield "KL at fewer bytes than exact's, and how many times ours"
    head = ["", *(f"{ratio:g}x fewer" for ratio in report["ratios"]), "wanted"]
    targets = [exact / ratio for ratio in report["ratios"]]
    best = [ours_at(report, target) for target in targets]
    cells = [head, ["ours, the best of all", *(plain(kl) for kl in best), ""]]
    for family in families:
        found = [kl_at(points_of(report, [family]), target) for target in targets]
        if not any(found) and len(points_of(report, [family])) < 2:
            continue  # a point, not a curve
        both = [(kl, own) for kl, own in zip(found, best, strict=True) if kl and own]
        times = min((kl / own for kl, own in both), default=None)
        wanted = at_least(times, LEAST_WORSE) if times and family in WORSE else ""
        texts = [
            f"{kl:.4f} ({kl / own:.2f})" if kl and own else plain(kl)
            for kl, own in zip(found, best, strict=True)
        ]
        cells.append([family, *texts, wanted])
    yield from markdown(cells)


def own_lines(report: dict[str, Any]) -> Iterator[str]:
    """Compare what is a point, not a curve, with ours at its bytes."""
    rows = [row for row in report["rows"] if row["family"] in ("all low", "fewer experts")]
    if not rows:
        return
    exact = report["rows"][0]["bytes_per_token"]
    cells = [("", "fewer bytes", "KL", "ours there", "times ours")]
    for row in rows:
        size, kl = row["bytes_per_token"], row["kl"]
        own = ours_at(report, size)
        times = f"{kl / own:.2f}" if own else ""
        cells.append((row["mode"], f"{exact / size:.2f}x", f"{kl:.4f}", plain(own), times))
    yield from markdown(cells)


def share_lines(report: dict[str, Any]) -> Iterator[str]:
    found = share_test(report)
    if found is None:
        return
    yield "half of the pairs low: those with the smaller gates, against the others by estimate;"
    yield "less noise: with exact's own noise subtracted from each KL first"
    head = ("", "KL of the smaller", "KL of the others", "times", "wanted")
    cells: list[Sequence[str]] = [head]
    for name, (smaller, others) in found.items():
        times = others / smaller if smaller > 0 else math.inf
        wanted = at_least(times, LEAST_SHARE)
        cells.append((name, f"{smaller:.4f}", f"{others:.4f}", f"{times:.2f}", wanted))
    yield from markdown(cells)


def share_test(report: dict[str, Any]) -> dict[str, tuple[float, float]] | None:
    """Return by each estimate the KL of the pairs with smaller gates, and that of the others."""
    rows = [row_of(report, name) for name in (NOISE, SMALLER, EVEN, ODD, "all-low")]
    if any(row is None for row in rows):
        return None
    noise, *kls = (row["kl"] for row in rows if row is not None)
    estimates = {}
    for suffix, less in (("", 0.0), (", less noise", noise)):
        smaller, even, odd, all_low = (kl - less for kl in kls)
        estimates[f"by difference{suffix}"] = (smaller, all_low - smaller)
        estimates[f"by layers{suffix}"] = (smaller, even + odd - smaller)
    return estimates


def plain(kl: float | None) -> str:
    return f"{kl:.4f}" if kl else "not measured"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a curve for each family, and what is a point."""

    def marks(families: Sequence[str]) -> list[plot.Mark]:
        names: dict[tuple[float, float, float], list[str]] = {}
        for row in report["rows"]:
            if row["family"] in families:
                at = (row["bytes_per_token"], row["kl"], row["kl_se"])
                names.setdefault(at, []).append(row["mode"])
        # Modes that come to the same rule are one mark.
        return [plot.Mark(", ".join(same), *at) for at, same in names.items()]

    points = ("exact", "modes", "all low", "fewer experts")
    apart = (*points, "noise", "share test", MORE, MORE_OURS)
    curves = [(f, marks([f])) for f in measured_families(report) if f not in apart]
    title = f"{Path(report['file']).name}, half of the experts cached"
    plot.plot(path, marks((*points, MORE, MORE_OURS)), title=title, curves=curves)
