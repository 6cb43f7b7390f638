"""The dial: what -Q, --t1 and --t2 come to, and one clear error for all that is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gates import Bench, layout_of, opened, run
from lowfiles import layout_of as plain_layout
from mixed import MIXED, low_of
from moefile import write_moe
from test_calibration import CALIBRATION

import hobbit
from hobbit.calibrate import Effort, calibrate
from hobbit.calibration import BUDGETS, path_of, rule_for, save
from hobbit.errors import ModelError, PlanError, UnsupportedModelError, UsageError
from hobbit.fingerprint import fingerprint
from hobbit.layout import Layout
from hobbit.low_file import low_path
from hobbit.nested import make_nested
from hobbit.prepare import make_low
from hobbit.quality import EXACT_NAME, ROOMY, Quality, choose
from hobbit.rule import ALL_LOW, EXACT, Rule


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return plain_layout(write_moe(tmp_path / "m.gguf", kind="Q8_0"))


@pytest.fixture
def low(layout: Layout) -> Path:
    """Where hobbit prepare leaves it."""
    return make_low(layout, low_path(layout.gguf), "q4_0").path


@pytest.fixture
def known(layout: Layout, low: Path) -> Path:
    save(replace(CALIBRATION, source=fingerprint(layout.gguf)), path_of(low))
    return low


def refusal(kind: type[Exception], layout: Layout, *arguments: Any, **named: Any) -> str:
    with pytest.raises(kind) as refused:
        choose(layout, *arguments, **named)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestWhatIsMissing:
    """Never a silent fallback."""

    @pytest.mark.parametrize("quality", [*BUDGETS, "0.02", 0.02])
    def test_the_low_copy(self, layout: Layout, quality: str | float) -> None:
        model = layout.gguf.parts[0].path
        assert refusal(ModelError, layout, quality) == (
            f"{model}: has no low-precision copy of its experts yet: run hobbit prepare {model}, "
            "or name a smaller GGUF of the same model with --low-file"
        )
        assert "has no low-precision copy" in refusal(ModelError, layout, t1=0.5, t2=0.9)

    @pytest.mark.parametrize("quality", [*BUDGETS, "0.02", 0.02])
    def test_the_calibration(self, layout: Layout, low: Path, quality: str | float) -> None:
        model = layout.gguf.parts[0].path
        assert refusal(ModelError, layout, quality) == (
            f"{low}: is not calibrated, so that no mode is known to keep its promise: run "
            f"hobbit prepare {model} --low-file {low}, or give --t1 and --t2"
        )

    def test_a_calibration_of_this_model(self, layout: Layout, low: Path) -> None:
        save(replace(CALIBRATION, source="0" * 64), path_of(low))
        assert "the calibration is of another model" in refusal(ModelError, layout, "fast")
        path_of(low).write_text("{")
        assert "cannot read the calibration: it is not JSON" in refusal(ModelError, layout, "fast")
        # Thresholds by hand need none.
        assert choose(layout, t1=0.5, t2=0.9).rule == Rule(0.5, 0.9)

    def test_the_named_file(self, layout: Layout, known: Path, tmp_path: Path) -> None:
        assert "none.gguf: no such file" in refusal(
            ModelError, layout, "fast", tmp_path / "none.gguf"
        )

    def test_experts(self, tmp_path: Path) -> None:
        dense = plain_layout(write_moe(tmp_path / "d.gguf", dense=True))
        for named in ({"quality": "fast"}, {"quality": 0.02}, {"t1": 0.5}, {"t2": 0.5}):
            words = refusal(UsageError, dense, **named)
            assert words.endswith("d.gguf: has no experts that stream: only -Q exact makes sense")
        assert choose(dense) == Quality(EXACT_NAME, EXACT)


class TestWhatMakesNoSense:
    @pytest.mark.parametrize("quality", ["best", "", "0", "-1", "nan", "inf", "FAST", 0.0, -0.5])
    def test_quality(self, layout: Layout, known: Path, quality: str | float) -> None:
        assert refusal(UsageError, layout, quality) == (
            f"{quality}: a quality is exact, high, balanced, fast or a KL budget above 0, as 0.02"
        )

    @pytest.mark.parametrize("thresholds", [{"t1": 0.5}, {"t2": 0.5}, {"t1": 0.2, "t2": 0.5}])
    @pytest.mark.parametrize("quality", ["fast", 0.02])
    def test_both_ways(
        self, layout: Layout, known: Path, quality: str, thresholds: dict[str, float]
    ) -> None:
        assert refusal(UsageError, layout, quality, **thresholds) == (
            f"-Q {quality} and --t1/--t2 are two ways to say the same: give one"
        )

    def test_patience(self, layout: Layout, known: Path) -> None:
        words = refusal(UsageError, layout, "fast", patience=3)
        assert words == "-Q fast and --t1/--t2 are two ways to say the same: give one"
        words = refusal(UsageError, layout, patience=3, deterministic=True)
        assert words == "--patience goes by what is cached, and --deterministic does not"
        found = choose(layout, t1=0.5, patience=3)
        assert (found.rule, found.name) == (Rule(0.5, 1.0, patience=3), "T1 0.5, T2 1, patience 3")
        assert choose(layout, patience=3).rule == Rule(1.0, 1.0, patience=3)

    def test_t1_above_t2(self, layout: Layout, known: Path) -> None:
        words = refusal(UsageError, layout, t1=0.9, t2=0.6)
        assert words == "T1 is 0.9 and T2 is 0.6: T1 must not be above T2"

    def test_a_budget_below_what_was_measured(self, layout: Layout, known: Path) -> None:
        words = refusal(UsageError, layout, 1e-7)
        assert words.startswith("a KL of 1e-07 is below what this low copy was measured at")
        least = float(words.split("smallest budget is ")[1].split(",")[0])
        assert choose(layout, least).rule == rule_for(CALIBRATION, least)

    def test_a_wrong_pair(self, layout: Layout, tmp_path: Path) -> None:
        other = plain_layout(write_moe(tmp_path / "other.gguf", kind="Q8_0", seed=1))
        theirs = make_low(other, tmp_path / "theirs.gguf", "q4_0").path
        larger = write_moe(tmp_path / "larger.gguf", kind="F16")
        fewer = write_moe(tmp_path / "fewer.gguf", kind="Q4_0", layers=1)
        shaped = write_moe(tmp_path / "shaped.gguf", kind="Q4_0", experts=8)
        dense = write_moe(tmp_path / "dense.gguf", dense=True)
        for file, words in (
            (theirs, "was made from another file (other.gguf, "),
            (larger, "is f16, larger than q8_0"),
            (fewer, "has no tensor blk.1."),
            (shaped, " x 8, not "),
            (dense, "has no tensor blk.0."),
            (layout.gguf.parts[0].path, "are q8_0: not smaller"),
        ):
            for named in ({"quality": "fast"}, {"t1": 0.5, "t2": 0.9}):
                said = refusal(ModelError, layout, low_file=file, **named)
                assert said.startswith(f"{file}: ")
                assert words in said

    def test_a_low_file_of_a_nested_copy(self, layout: Layout, known: Path, tmp_path: Path) -> None:
        nested = plain_layout(make_nested(layout, tmp_path / "nested.gguf"))
        words = refusal(UsageError, nested, "fast", known)
        assert words == f"{known}: a nested copy has its low-precision experts in itself"


class TestWhatIsChosen:
    def test_exact_needs_nothing(self, layout: Layout) -> None:
        for deterministic in (False, True):
            found = choose(layout, deterministic=deterministic)
            assert found == Quality(EXACT_NAME, EXACT)
            assert found.label == "exact"

    @pytest.mark.parametrize("name", BUDGETS)
    def test_a_named_mode(self, layout: Layout, known: Path, name: str) -> None:
        found = choose(layout, name)
        assert (found.name, found.rule) == (name, rule_for(CALIBRATION, name))
        assert found.low is not None and found.low.gguf.parts[0].path == known
        assert [g.index for g in found.low.groups] == [g.index for g in layout.groups]
        # A budget is another word for it.
        number = choose(layout, BUDGETS[name])
        assert number.rule == choose(layout, str(BUDGETS[name])).rule == found.rule
        assert number.name == f"KL {BUDGETS[name]:g}"

    def test_the_label_tells_the_kl(self, layout: Layout, known: Path) -> None:
        rules = {point.rule: point for point in CALIBRATION.points}
        found = choose(layout, "fast")
        if found.rule in rules:
            assert found.point == rules[found.rule]
            assert found.label == f"fast (KL {found.point.kl:.3f} measured)"
        measured = choose(layout, min(p.bound for p in CALIBRATION.points))
        assert measured.point is not None
        assert f"(KL {measured.point.kl:.3f} measured, deterministic)" in (
            choose(layout, measured.point.bound, deterministic=True).label
        )

    def test_deterministic(self, layout: Layout, known: Path) -> None:
        for named in ({"quality": "fast"}, {"t1": 0.5, "t2": 0.9}):
            found = choose(layout, **named, deterministic=True)  # type: ignore[arg-type]
            plain = choose(layout, **named)  # type: ignore[arg-type]
            assert found.rule == replace(plain.rule, deterministic=True) != plain.rule
            assert found.point == plain.point

    def test_all_low_is_allowed_where_it_is_within_the_budget(
        self, layout: Layout, known: Path
    ) -> None:
        bound = CALIBRATION.all_low.bound
        assert choose(layout, bound).all_low == CALIBRATION.all_low
        assert choose(layout, bound * 0.999).all_low is None
        assert choose(layout, bound, deterministic=True).all_low is None

    @pytest.mark.parametrize(
        ("thresholds", "rule"),
        [
            ({"t1": 0.5}, Rule(0.5, 1.0)),
            ({"t2": 0.9}, Rule(0.9, 0.9)),
            ({"t1": 0.5, "t2": 0.9}, Rule(0.5, 0.9)),
            ({"t1": 0.0, "t2": 0.0}, Rule(0.0, 0.0)),
            ({"t1": -1.0}, Rule(-1.0, 1.0)),
            ({"t1": 1.0, "t2": 1.0}, Rule(1.0, 1.0)),
        ],
    )
    def test_thresholds_by_hand(
        self, layout: Layout, low: Path, thresholds: dict[str, float], rule: Rule
    ) -> None:
        found = choose(layout, **thresholds)  # type: ignore[arg-type]
        assert found.rule == rule
        assert found.name == f"T1 {rule.t1:g}, T2 {rule.t2:g}"
        assert (found.low is not None) == rule.needs_low
        assert found.point is found.all_low is None

    def test_skipping_needs_no_low_copy(self, layout: Layout) -> None:
        assert choose(layout, t2=0.9) == Quality("T1 0.9, T2 0.9", Rule(0.9, 0.9))

    def test_a_smaller_gguf_serves_as_well(self, layout: Layout, tmp_path: Path) -> None:
        smaller = write_moe(tmp_path / "smaller.gguf", kind="Q4_0")
        found = choose(layout, low_file=smaller, t1=0.5)
        assert found.low is not None and found.low.gguf.parts[0].path == smaller

    def test_a_nested_copy_has_its_own(self, layout: Layout, tmp_path: Path) -> None:
        nested = plain_layout(make_nested(layout, tmp_path / "nested.gguf"))
        found = choose(nested, t1=0.5)
        assert found.low is nested.low is not None
        words = refusal(ModelError, nested, "fast")
        assert words.startswith(f"{tmp_path / 'nested.gguf'}: is not calibrated")


@pytest.mark.parametrize(
    ("share", "name"), [(1.0, "roomy"), (ROOMY, "roomy"), (ROOMY - 0.01, "tight"), (0.0, "tight")]
)
def test_what_little_memory_leaves(share: float, name: str) -> None:
    """The promise was measured with half of the experts cached: with less another rule keeps it."""
    tight = Quality("tight", Rule(0.9, 1.0))
    measured = Quality("roomy", Rule(0.1, 1.0), measured=True, tight=tight)
    assert measured.at(share).name == name
    alone = replace(measured, tight=None)
    if name == "tight":
        with pytest.raises(UsageError, match=r"-Q roomy needs more memory here: .* below 45 %"):
            alone.at(share)
    by_hand = replace(alone, measured=False)
    assert by_hand.at(share) is by_hand


EFFORT = Effort(wide_tokens=192, single_tokens=192, window=96, measurements=5, patience=(2,))
TEXT = "it is the end of a day and they were not at home with you by the " * 20


@pytest.fixture(scope="module")
def model(bench: Bench) -> Path:
    def make(path: Path) -> Path:
        tiny.make(path, "qwen3moe", n_used=4)
        layout = layout_of(path)
        copy = make_low(layout, low_path(layout.gguf), "q4_0").path
        found = calibrate(layout, copy, TEXT, "words", threads=1, memory="1G", effort=EFFORT)
        assert len(found.points) < EFFORT.measurements + len(EFFORT.patience)
        save(found, path_of(copy))
        return path

    return bench.model("calibrated", make)


class TestLlama:
    """From calibration to generation, on a real model."""

    def test_a_budget(self, model: Path) -> None:
        exact, low = choose(layout_of(model)), choose(layout_of(model), 5.0)
        assert low.all_low is not None and low.rule != exact.rule
        with opened(model, "floor", MIXED, quality=5.0) as llm:
            assert llm.quality == low.tight  # less than half of the experts fit
            run(llm, MIXED)
            assert llm.stats.pairs_low + llm.stats.pairs_skip > 0
            assert llm.stats.unscored == 0 < llm.stats.scored
        with opened(model, "floor", MIXED, quality="5", deterministic=True) as llm:
            assert low.tight is not None
            assert llm.rule == replace(low.tight.rule, deterministic=True)

    def test_with_room_for_all_they_become_high(self, model: Path) -> None:
        """All low keeps the promise, and would be kept for nothing; but not if it was asked for."""
        assert choose(layout_of(model), 5.0).rule == ALL_LOW
        for deterministic in (False, True):
            with opened(model, "all", MIXED, quality=5.0, deterministic=deterministic) as llm:
                for _ in range(6):
                    before = llm.stats
                    found = run(llm, MIXED)
                last = llm.stats.minus(before)
                assert (last.pairs_low == 0) is not deterministic
                assert (last.pairs_high == 0) is deterministic
        assert np.isfinite(found).all()

    def test_low_copies_are_resident_where_all_low_keeps_the_promise(self, model: Path) -> None:
        layout = layout_of(model)
        size = layout.expert_bytes * 95 // 100
        within = choose(layout, 5.0).all_low
        assert within is not None
        for quality, resident in ((5.0, True), (within.bound * 0.99, False)):
            with opened(model, size, MIXED, quality=quality) as llm:
                assert llm.plan.low_is_resident is resident
                run(llm, MIXED)
        with opened(model, size, MIXED, quality=5.0, resident_low="off") as llm:
            assert not llm.plan.low_is_resident
        with opened(model, "floor", MIXED, quality=5.0) as llm:
            assert not llm.plan.low_is_resident
        with (
            pytest.raises(PlanError, match="do not fit a memory cap"),
            opened(model, "floor", MIXED, quality=5.0, resident_low="on"),
        ):
            pass

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"quality": "best"}, "a quality is exact, high"),
            ({"quality": "fast", "rule": Rule(0.5, 0.5)}, "quality and rule are two ways"),
            ({"resident_low": "yes"}, "resident_low is 'yes': use auto, on or off"),
            ({"resident_low": "on"}, "resident low copies are for a lossy quality"),
        ],
    )
    def test_refusals(self, model: Path, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError) as refused:
            hobbit.Llama(str(model), cache_bytes="floor", **MIXED.llama_arguments(), **arguments)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_gate_weights_that_are_not_seen(self, bench: Bench) -> None:
        """llama4 multiplies by them before the experts."""
        path = bench.arch("llama4")
        low = low_of(bench, path, "q4_0")
        with pytest.raises(UnsupportedModelError) as refused:
            calibrate(
                layout_of(path), low, TEXT, "words",
                threads=1, memory="1G", effort=EFFORT,
            )  # fmt: skip
        assert "its gate weights are not where hobbit looks for them" in str(refused.value)
        assert "\n" not in str(refused.value)
