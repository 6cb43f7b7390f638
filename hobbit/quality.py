"""The dial: what a quality, or thresholds given by hand, come to for one model.

`exact` needs nothing. A named mode or a KL budget needs the low-precision copy of the experts and
what calibration measured of the two. There is no silent fallback: what is missing is an error.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import calibration
from .calibration import BUDGETS, Calibration, Point
from .errors import ModelError, UsageError
from .fingerprint import fingerprint
from .gguf_file import open_gguf
from .layout import Layout, LowCopies
from .low_file import check_pair, find_low
from .rule import EXACT, Rule

EXACT_NAME = "exact"
# What counts as half of the experts: calibration has a little less than half the slots.
ROOMY = 0.45


@dataclass(frozen=True)
class Quality:
    """A rule, the mode that it is, and the low copies that it needs.

    `number` says that a token uses another number of experts than the model's own, as
    Layout.other_number does: then nothing is what its mode is called, exact neither.
    `point` is what calibration measured of it; `all_low` what calibration measured with every
    expert low, if that is within the budget asked for: then a low copy may stand in anywhere.
    A `measured` quality keeps its promise with half of the experts cached, or more; `tight` is what
    keeps it with less, if anything does.
    """

    mode: str
    rule: Rule
    low: LowCopies | None = None
    point: Point | None = None
    all_low: Point | None = None
    measured: bool = False
    tight: Quality | None = None
    number: str = ""

    @property
    def name(self) -> str:
        """What it is called, and is shown as."""
        if not self.number:
            return self.mode
        return self.number if self.mode == EXACT_NAME else f"{self.mode}, {self.number}"

    def of(self, layout: Layout) -> Quality:
        """Return it as that of a model with this layout.

        Raises UsageError for a promise, where a token uses another number of experts than when it
        was measured.
        """
        if layout.other_number and (self.measured or self.point is not None):
            raise UsageError(_no_promise(self.mode, layout))
        return replace(self, number=layout.other_number)

    def at(self, cached_share: float) -> Quality:
        """Return what is meant with room for this share of the experts.

        Raises UsageError if nothing keeps the promise there.
        """
        if not self.measured or cached_share >= ROOMY:
            return self
        if self.tight is None:
            raise UsageError(
                f"-Q {self.name} needs more memory here: there is room for "
                f"{100 * cached_share:.0f} % of the experts, and below {100 * ROOMY:.0f} % this "
                "low copy does not keep that promise; or take a larger budget, or --t1 and --t2"
            )
        return self.tight

    @property
    def label(self) -> str:
        """Say the mode in a few words, with its measured KL where there is one."""
        if self.rule == EXACT:
            return self.number or EXACT_NAME
        how = ", deterministic" if self.rule.deterministic else ""
        if self.point is None:
            return f"{self.name}{how}"
        kl = self.point.kl if self.measured else self.point.kl_any
        return f"{self.name} (KL {kl:.3f} measured{how})"


def choose(
    layout: Layout,
    quality: str | float = EXACT_NAME,
    low_file: Path | None = None,
    *,
    t1: float | None = None,
    t2: float | None = None,
    patience: int = 0,
    deterministic: bool = False,
) -> Quality:
    """Return what is meant for this model.

    `low_file` is a GGUF of the same experts in fewer bits; without it, the copy that `hobbit
    prepare` made. Raises UsageError for what makes no sense, ModelError for what is not there.
    """
    number = layout.other_number
    model = layout.gguf.parts[0].path
    by_hand = t1 is not None or t2 is not None or patience > 0
    if by_hand and str(quality) != EXACT_NAME:
        raise UsageError(f"-Q {quality} and --t1/--t2 are two ways to say the same: give one")
    if patience > 1 and deterministic:
        raise UsageError("--patience goes by what is cached, and --deterministic does not")
    if not by_hand and quality == EXACT_NAME:
        return Quality(EXACT_NAME, EXACT, number=number)
    if not by_hand and number:
        raise UsageError(_no_promise(str(quality), layout))
    budget = None if by_hand else calibration.budget_of(quality)
    if not layout.groups:
        raise UsageError(f"{model}: has no experts that stream: only -Q exact makes sense")
    if budget is None:
        t2 = 1.0 if t2 is None else t2
        rule = Rule(t2 if t1 is None else t1, t2, deterministic, patience=patience)
        low = low_copies(layout, low_file) if rule.needs_low or low_file else None
        waits = f", patience {patience}" if patience > 1 else ""
        mode = f"T1 {rule.t1:g}, T2 {rule.t2:g}{waits}"
        return Quality(mode, rule, low, number=number)
    low = low_copies(layout, low_file)
    known = calibrated(layout, low)
    name = str(quality) if quality in BUDGETS else f"KL {budget:g}"
    if deterministic:
        rule = replace(calibration.rule_for(known, budget, roomy=False), deterministic=True)
        return Quality(name, rule, low, _point(known, rule))
    all_low = known.all_low if known.all_low.bound_any <= budget else None
    tight = None
    with suppress(UsageError):
        rule = calibration.rule_for(known, budget, roomy=False)
        tight = Quality(name, rule, low, _point(known, rule), all_low)
    rule = calibration.rule_for(known, budget)
    return Quality(name, rule, low, _point(known, rule), all_low, measured=True, tight=tight)


def _no_promise(quality: str, layout: Layout) -> str:
    return (
        f"-Q {quality} was measured with {layout.own_expert_used} experts a token, and promises "
        f"nothing with {layout.n_expert_used}: leave it out, or give --t1 and --t2"
    )


def low_copies(layout: Layout, low_file: Path | None = None) -> LowCopies:
    """Open and check the low-precision copy of a model; a nested one has its own."""
    if layout.low is not None:
        if low_file is not None:
            raise UsageError(f"{low_file}: a nested copy has its low-precision experts in itself")
        return layout.low
    path = low_file or find_low(layout.gguf)
    if path is None:
        model = layout.gguf.parts[0].path
        raise ModelError(
            f"{model}: has no low-precision copy of its experts yet: run hobbit prepare {model}, "
            "or name a smaller GGUF of the same model with --low-file"
        )
    low = open_gguf(path)
    return LowCopies(low, check_pair(layout, low))


def calibrated(layout: Layout, low: LowCopies) -> Calibration:
    """Return what calibration measured of the model with this low copy."""
    path = low.gguf.parts[0].path
    known = calibration.load(calibration.path_of(path), fingerprint(layout.gguf))
    if known is None:
        raise ModelError(
            f"{path}: is not calibrated, so that no mode is known to keep its promise: run "
            f"hobbit prepare {layout.gguf.parts[0].path} --low-file {path}, or give --t1 and --t2"
        )
    return known


def _point(known: Calibration, rule: Rule) -> Point | None:
    plain = replace(rule, deterministic=False)
    return next((p for p in known.points if replace(p.rule, deterministic=False) == plain), None)
