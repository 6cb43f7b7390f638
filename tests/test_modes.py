from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from moefile import write_moe
from test_calibration import CALIBRATION, RULES

from hobbit.calibration import path_of, save
from hobbit.errors import ModelError, UsageError
from hobbit.fingerprint import fingerprint
from hobbit.gguf_file import open_gguf
from hobbit.low_file import low_path
from hobbit.modes import check_low, companions, default_modes, mode, modes
from hobbit.rule import ALL_LOW, EXACT, Rule


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("exact", EXACT),
        ("all-low", ALL_LOW),
        ("skip-only:0.9", Rule(0.9, 0.9)),
        ("0.6:0.9", Rule(0.6, 0.9)),
        ("0:1", Rule(0.0, 1.0)),
        ("0.6:0.9:4", Rule(0.6, 0.9, patience=4)),
        ("fewer:1", Rule(deterministic=True, renormalise=True, experts=1)),
        ("substitute:0.5", Rule(substitute=0.5)),
        ("reversed:0.2:1", Rule(0.2, 1.0, reversed=True)),
        ("0.015", RULES[1]),
        ("1e-2", None),
        ("high", None),
    ],
)
def test_modes(name: str, rule: Rule | None) -> None:
    found = mode(name, CALIBRATION, "m.gguf")
    assert found[0] == name
    assert found[1] == rule or (rule is None and 0.8 < found[1].t1 < 0.9)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("best", "unknown mode 'best': use exact, high"),
        ("", "unknown mode ''"),
        ("skip-only", "unknown mode 'skip-only'"),
        ("-1", "unknown mode '-1'"),
        ("skip-only:2", "must be a number from 0 to 1"),
        ("substitute:x", "must be a number from 0 to 1"),
        ("0.9:x", "must be a number from 0 to 1"),
        ("0.6:0.9:1.5", "must be T1:T2 or T1:T2:PATIENCE"),
        ("0.6:0.9:2:2", "must be T1:T2 or T1:T2:PATIENCE"),
        ("fewer:0", "must be a number of experts, 1 or more"),
        ("fewer:x", "must be a number of experts, 1 or more"),
    ],
)
def test_unknown_modes(name: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        mode(name, CALIBRATION, "m.gguf")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_t1_above_t2() -> None:
    with pytest.raises(UsageError, match="T1 must not be above T2"):
        mode("0.9:0.6", None, "m.gguf")


@pytest.mark.parametrize("name", ["high", "balanced", "fast", "0.02"])
def test_qualities_need_a_calibration(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: .* not calibrated; run: hobbit prepare m.gguf"):
        mode(name, None, "m.gguf")


def test_a_list_of_modes() -> None:
    found = modes(["all-low", "exact", "all-low"], (None, None), None, "m.gguf")
    assert found == [("exact", EXACT), ("all-low", ALL_LOW)]


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ((0.6, 0.9), ("0.6:0.9", Rule(0.6, 0.9))),
        ((0.6, None), ("0.6:1", Rule(0.6, 1.0))),
        ((None, 0.9), ("0.9:0.9", Rule(0.9, 0.9))),
        ((0.0, 0.0), ("0:0", Rule(0.0, 0.0))),
    ],
)
def test_thresholds(
    thresholds: tuple[float | None, float | None], expected: tuple[str, Rule]
) -> None:
    assert modes([], thresholds, None, "m.gguf") == [("exact", EXACT), expected]


def test_deterministic_is_for_what_is_not_exact() -> None:
    found = dict(modes(["0.6:1", "1:1"], (None, None), None, "m", deterministic=True))
    assert found["exact"] == EXACT
    assert found["0.6:1"] == Rule(0.6, 1.0, deterministic=True)


def test_a_low_copy_is_asked_for_where_it_is_needed() -> None:
    names = ["skip-only:0.5", "1:1", "all-low"]
    asked = modes(names, (None, None), None, "m.gguf")
    check_low(asked[:3], None, "m.gguf")
    check_low(asked, Path("low.gguf"), "m.gguf")
    with pytest.raises(UsageError, match=r"all-low: .* low copy .*; run: hobbit prepare m\.gguf"):
        check_low(asked, None, "m.gguf")


def test_companions_and_what_is_compared_by_default(tmp_path: Path) -> None:
    gguf = open_gguf(write_moe(tmp_path / "m.gguf"))
    given = tmp_path / "low.gguf"
    assert companions(gguf, None) == (None, None)
    assert companions(gguf, given) == (given, None)
    assert default_modes(None, None) == []
    assert default_modes(given, None) == ["all-low"]
    calibration = replace(CALIBRATION, source=fingerprint(gguf))
    save(calibration, path_of(given))
    assert companions(gguf, given) == (given, calibration)
    assert default_modes(given, calibration) == ["high", "balanced", "fast"]
    assert default_modes(given, replace(calibration, points=())) == []
    prepared = low_path(gguf)
    prepared.touch()
    assert companions(gguf, None) == (prepared, None)
    save(CALIBRATION, path_of(prepared))
    with pytest.raises(ModelError, match="of another model"):
        companions(gguf, None)
