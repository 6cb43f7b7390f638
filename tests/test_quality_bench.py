"""scripts/quality-bench on a model of a few MB: its arms run, its tables say what the runs say."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import benchmodels
import measuring
import numpy as np
import pytest
import quality
import quality_frontier
import quality_speed

from hobbit.cgroup import MemoryGroup
from hobbit.disk import drop_from_page_cache
from hobbit.errors import CapUnavailable, UsageError
from hobbit.evaluate import Row
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.low_file import find_low
from hobbit.nested import make_nested
from hobbit.prepare import make_low
from hobbit.rule import EXACT, Rule


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.gguf"
    shape = replace(
        benchmodels.SHAPES["olmoe-1b-7b"], n_layer=2, n_embd=256, n_head=4, n_head_kv=4,
        head_dim=64, n_ff=256, n_expert=8, n_expert_used=2, n_vocab=512,
    )  # fmt: skip
    benchmodels.synthesize("small", shape, benchmodels.SYNTHETIC_TYPES["Q8_0"], path)
    return path


@pytest.fixture
def direct_io(model: Path) -> None:
    try:
        os.close(os.open(model, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{model.parent} is on a file system without direct I/O")


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return {row[0]: row for row in rows}


# speed


def speed(model: Path, *more: str) -> list[str]:
    common = ["--model-file", str(model), "--quick", "--memory", "0", "--threads", "1"]
    return ["speed", "olmoe", *common, *more]


def test_every_mode_runs(
    model: Path, direct_io: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nested, file = tmp_path / "nested.gguf", tmp_path / "report.json"
    make_nested(build_layout(open_gguf(model)), nested)
    arms = ["--arms", "exact", "balanced", "fast", "nested:fast", "--nested", str(nested)]
    given = ["--rule", "fast=0:1", "--json", str(file)]
    assert quality.main(speed(model, *arms, *given)) == 0
    out = capsys.readouterr().out
    assert find_low(open_gguf(model)) is not None
    assert "q4_0, importance none" in out
    assert "HOBBIT" in out
    report = json.loads(file.read_text())
    runs = {name: found[0] for name, found in report["runs"].items()}
    assert [*runs] == ["exact", "balanced", "fast", "nested:fast"]
    for run in runs.values():
        assert len(run["seconds"]) == 4
        assert run["tok_s"] > 0
        assert run["high"] + run["low"] + run["skipped"] == pytest.approx(1)
    assert report["rules"]["fast"]["words"] == "T1 0 T2 1"
    assert report["rules_from"].endswith("by hand: fast")
    # Both have room for all experts: a pair is low unless its high copy is there already.
    assert runs["exact"]["low"] == 0
    assert runs["fast"]["low"] > 0
    assert runs["nested:fast"]["low"] > 0


def test_quantiles_give_the_shares_that_they_name() -> None:
    histogram = np.zeros(1000, np.int64)
    histogram[:] = 10  # s is anything, each as often
    layout: Any = type("L", (), {"n_expert_used": 8})
    for name, (lower, skipped) in quality_speed.SHARES.items():
        rule = quality_speed.quantile_rule(name, layout, histogram.tolist())
        # An eighth of all pairs is on top and not in the histogram.
        assert isinstance(rule.t1, float) and isinstance(rule.t2, float)
        assert (1 - rule.t1) * 7 / 8 == pytest.approx(lower, abs=0.002)
        assert (1 - rule.t2) * 7 / 8 == pytest.approx(skipped, abs=0.002)


@pytest.mark.parametrize(
    "wrong",
    [["--arms", "exact", "quick"], ["--arms", "nested:fast"], ["--rule", "fast"],
     ["--rule", "exact=0:1"], ["--rule", "fast=0.9:0.6"], ["--memory", "x%"]],
)  # fmt: skip
def test_wrong_options_are_one_line(
    wrong: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(speed(model, *wrong)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("quality-bench: ")


def test_a_cap_is_a_size_or_a_share() -> None:
    assert quality_speed.cap_of("55%", 1000) == 550
    assert quality_speed.cap_of("2G", 1000) == 2 << 30
    with pytest.raises(UsageError):
        quality_speed.cap_of("x%", 1000)


def speed_report() -> dict[str, Any]:
    def run(rate: float, **more: Any) -> dict[str, Any]:
        known = {
            "tok_s": rate,
            "seconds": [1 / rate] * 100,
            "bytes_per_token": 10 << 20,
            "high": 1.0,
            "low": 0.0,
            "skipped": 0.0,
            "hit_rate": 0.5,
            "peak_rss_bytes": 1 << 30,
            "cached_share": 0.48,
            "low_is_resident": False,
        }
        return known | more

    slow = run(2.0) | {"seconds": [0.5] * 90 + [2.0] * 10}
    return {
        "machine": measuring.machine(),
        "model": "demo",
        "size_bytes": 4 << 30,
        "low": "iq4_nl",
        "rules_from": "by hand",
        "rules": {name: {"words": "?"} for name in quality_speed.MODES},
        "read_bps": 500 << 20,
        "disk_bytes_s": float(1 << 30),
        "cap_bytes": 2 << 30,
        "runs": {
            "exact": [run(2.0), run(9.0), run(1.0)],
            "balanced": [run(2.7), run(2.6), run(2.5)],
            "fast": [run(3.1), run(3.2), run(3.0)],
            "resident:exact": [slow],
            "resident:fast": [run(8.0, low_is_resident=True)],
        },
    }


def test_the_speed_table_says_what_was_missed() -> None:
    lines = list(quality_speed.table(speed_report()))
    second = next(i for i, line in enumerate(lines) if "token time" in line)
    rows, times = cells(lines[:second]), cells(lines[second:])
    assert rows["balanced"][1:4] == ["2.60 (2.50-2.70)", "1.30", "1.3 or more: met"]
    assert rows["fast"][2:4] == ["1.55", "1.6 or more: MISSED"]
    assert rows["resident:fast"][2] == "4.00"
    assert rows["resident:fast"][9] == "low resident"
    assert any("pinned to 500 MiB/s" in line for line in lines)
    assert times["resident:fast"][1:] == ["125.0", "125.0", "1.00", "1.30 or less: met"]
    assert times["resident:exact"][1:] == ["500.0", "2000.0", "4.00", "above 1.3"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a cgroup needs root")
def test_the_disk_is_pinned(tmp_path: Path, direct_io: None) -> None:
    file = tmp_path / "file"
    program = (
        "import measuring, sys, pathlib; print(measuring.read_rate(pathlib.Path(sys.argv[1])))"
    )
    folder = Path(measuring.__file__).parent
    command = ["env", f"PYTHONPATH={folder}", sys.executable, "-c", program]
    try:
        file.write_bytes(os.urandom(6 << 20))
        drop_from_page_cache(file)
        with MemoryGroup(400 << 20, 4 << 20, file) as group:
            done = group.run([*command, str(file)])
            assert done.returncode == 0
            assert float(done.stdout) < 6 << 20
        assert not any(path.exists() for path in group.paths)
    except (CapUnavailable, FileNotFoundError) as exc:
        pytest.skip(str(exc))


def test_a_read_limit_needs_a_file() -> None:
    with pytest.raises(ValueError, match="disk"):
        MemoryGroup(1 << 20, 1 << 20)


# frontier


def test_the_frontier_is_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = ["--low-file", str(made_low(model, tmp_path))]
    file, picture = tmp_path / "report.json", tmp_path / "frontier.png"
    asked = ["--mode", "0.3:1", "--mode", "substitute:0.5", "--json", str(file)]
    draws = importlib.util.find_spec("matplotlib") is not None
    asked += ["--plot", str(picture)] if draws else []
    assert quality.main(["frontier", "--model-file", str(model), *low, "--quick", *asked]) == 0
    out, err = capsys.readouterr()
    assert "not calibrated" in err
    assert not draws or picture.read_bytes().startswith(b"\x89PNG")
    rows = {row["mode"]: row for row in json.loads(file.read_text())["rows"]}
    families = {row["family"] for row in rows.values()}
    added = {"exact", "noise", quality_frontier.MORE, quality_frontier.MORE_OURS}
    assert families == {*quality_frontier.FAMILIES, *added} - {"modes"}
    assert rows["0.3:1"]["family"] == quality_frontier.MORE_OURS
    assert rows["exact"]["kl"] == 0
    # Two tokens a step: other kernels, the same model.
    assert rows[quality_frontier.NOISE]["kl"] < 0.1 * rows["all-low"]["kl"]
    assert rows["all-low"]["high"] == 0
    assert rows["0:1:2"]["rule"]["patience"] == 2
    half = rows[quality_frontier.SMALLER]
    assert (half["high"], half["low"]) == (0.5, 0.5)
    for name in (quality_frontier.EVEN, quality_frontier.ODD):
        assert rows[name]["low"] == 0.5
    assert "half of the pairs low" in out


def made_low(model: Path, folder: Path) -> Path:
    return make_low(build_layout(open_gguf(model)), folder / "low.gguf", "q4_0").path


def test_noise_is_of_two_tokens_a_step() -> None:
    class Recorder:
        n_vocab, n_ctx = 4, 8

        def __init__(self) -> None:
            self.batches: list[list[int]] = []

        def begin(self, rule: Rule) -> None: ...

        def clear(self) -> None: ...

        def decode(self, tokens: list[int], *, logits: bool = True) -> Any:
            self.batches.append([*tokens])
            return np.array([[token] * 4 for token in tokens], np.float32)

    inner: Any = Recorder()
    model = quality_frontier.InPairs(inner, [[1, 2, 3, 4], [5, 6, 7]])
    model.pairs = True
    for _ in range(2):  # from the beginning in every arm
        model.begin(EXACT)
        rows = []
        for part in ([1, 2, 3], [5, 6]):
            model.clear()
            rows += [model.decode([token]) for token in part]
        assert [float(row[0, 0]) for row in rows] == [1, 2, 3, 5, 6]
    # A window's last token is predicted, never decoded.
    assert inner.batches == [[1, 2], [3], [5, 6]] * 2


def test_kl_is_interpolated_in_its_logarithm() -> None:
    points = [(100.0, 0.01), (50.0, 0.04), (80.0, 0.5), (40.0, 0.2)]
    kl = quality_frontier.kl_at(points, 75.0)
    assert kl == pytest.approx(math.sqrt(0.01 * 0.04))  # the point above the line is no matter
    assert quality_frontier.kl_at(points, 50.0) == pytest.approx(0.04)
    assert quality_frontier.kl_at(points, 101.0) is None
    assert quality_frontier.kl_at(points, 39.0) is None
    assert quality_frontier.kl_at([], 39.0) is None


def frontier_report() -> dict[str, Any]:
    def row(family: str, mode: str, fewer: float, kl: float) -> dict[str, Any]:
        known = dict.fromkeys(Row.__dataclass_fields__, 0.0)
        words = "all low" if mode in ("all-low", "fast") else "T1 0.5 T2 1"
        found = {"mode": mode, "rule": asdict(EXACT), "words": words, "kl": kl, "n_tokens": 100}
        return known | found | {"family": family, "bytes_per_token": 1e8 / fewer}

    return {
        "machine": measuring.machine(),
        "file": "/x/demo.gguf",
        "text": "sample",
        "sample": {"limit": 100, "window": 50},
        "cache_bytes": 1 << 20,
        "cached_share": 0.5,
        "ratios": [1.25, 2.0],
        "rows": [
            row("exact", "exact", 1.0, 0.0),
            row("noise", quality_frontier.NOISE, 1.3, 0.006),
            row("low", "0.9:1", 1.1, 0.01),
            row("low", "0.5:1", 1.25, 0.02),
            row("patience", "0:1:4", 2.0, 0.05),
            row("skip only", "skip-only:0.9", 1.25, 0.06),
            row("skip only", "skip-only:0.5", 2.0, 0.2),
            row("substitution", "substitute:0.1", 1.25, 0.03),
            row("all low", "all-low", 2.0, 0.08),
            row("modes", "high", 1.2, 0.011),
            row("modes", "fast", 2.0, 0.04),
            row("share test", quality_frontier.SMALLER, 1.5, 0.015),
            row("share test", quality_frontier.EVEN, 1.5, 0.03),
            row("share test", quality_frontier.ODD, 1.5, 0.05),
        ],
    }


def test_the_frontier_tables_say_what_was_missed() -> None:
    rows = cells(list(quality_frontier.table(frontier_report())))
    assert rows["high"][2:] == ["0.0110", "0.01 or less: MISSED", "1.20x", "1.15 or more: met"]
    assert rows["fast"][1] == "all low"  # and so not what all-low is compared with
    assert rows["ours, the best of all"][1:] == ["0.0200", "0.0500", ""]
    assert rows["skip only"][1:] == ["0.0600 (3.00)", "0.2000 (4.00)", "2 or more: met"]
    assert rows["substitution"][1:] == ["0.0300 (1.50)", "not measured", "2 or more: MISSED"]
    assert rows["all-low"][1:] == ["2.00x", "0.0800", "0.0500", "1.60"]
    assert rows["by difference"][1:] == ["0.0150", "0.0650", "4.33", "4 or more: met"]
    assert rows["by layers"][1:] == ["0.0150", "0.0650", "4.33", "4 or more: met"]
    assert rows["by difference, less noise"][1:4] == ["0.0090", "0.0650", "7.22"]
    assert rows["by layers, less noise"][1:4] == ["0.0090", "0.0590", "6.56"]


def test_thresholds_that_many_scores_share_are_one_rule() -> None:
    histogram = np.zeros((2, 1000), np.int64)
    histogram[:, 700] = 10
    arms = list(quality_frontier.rules(histogram, 2, 2, quick=False))
    assert len({arm.rule for arm in arms}) == len(arms)
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.family for arm in arms} == {*quality_frontier.FAMILIES} - {"modes"}
