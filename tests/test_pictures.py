"""hobbit plot: what the pictures show, in characters and as a PNG."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_calibration import CALIBRATION
from test_cli import hobbit
from traces import pseudo_trace

from hobbit.errors import ModelError, UsageError
from hobbit.pictures import Bars, Heat, Picture, Points, routing
from hobbit.pictures.files import pictures_of
from hobbit.pictures.reports import of_json
from hobbit.pictures.terminal import drawn
from hobbit.plot import Mark
from hobbit.policy import POLICIES
from hobbit.simulate import pools_of, simulate
from hobbit.trace import LAYER, read_trace

MIB = 1 << 20
MARKS = (Mark("exact", 100 * MIB, 0.0), Mark("fast", 50 * MIB, 0.07, 0.01))
PICTURES: list[Picture] = [
    Heat("who is used", ("layer 0", "layer 1"), np.array([[0, 10, 40], [20, 5, np.nan]]), "expert"),
    Bars("weights", ("0.0-0.5", "0.5-1.0"), (75.0, 25.0)),
    Bars("hits", ("layer 0", "layer 1"), (50.0, math.nan), full=100),
    Points("KL against bytes", MARKS, (Mark("", 75 * MIB, 0.02), Mark("", 25 * MIB, 0.2))),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return pseudo_trace(tmp_path / "t", tokens=60, groups=3, n_expert=32, n_used=4)


def text(pictures: Sequence[Picture], width: int = 60) -> list[str]:
    return drawn(pictures, width, io.StringIO()).splitlines()


def said(path: Path, **more: Any) -> tuple[list[Picture], list[str]]:
    lines: list[str] = []
    return pictures_of(path, policy="decay", say=lines.append, **more), lines


class TestWhatIsShown:
    def test_heat_counts_tokens(self, trace: Path) -> None:
        heat = routing.heat(read_trace(trace))
        assert heat.rows == ("layer 0", "layer 1", "layer 2") and heat.values.shape == (3, 32)
        # Each token uses four experts of a layer.
        assert np.allclose(heat.values.sum(axis=1), 400)
        whole = read_trace(trace)
        first = [e.experts for e in whole if e.kind == LAYER and e.group == 0]
        used = sum(5 in experts for experts in first)
        assert heat.values[0, 5] == pytest.approx(100 * used / 60)

    def test_weights_and_scores_by_hand(self, tmp_path: Path) -> None:
        """Two tokens with weights in no order; their shares are 3/4 and 1/4, 9/10 and 1/10."""
        whole = read_trace(pseudo_trace(tmp_path / "t", tokens=2, groups=1, n_used=2))
        whole = replace(whole, weights=np.array([1, 3, 18, 2], dtype=np.float32))
        weights, scores = routing.weights(whole), routing.scores(whole)
        assert weights is not None and scores is not None
        assert sum(weights.values) == pytest.approx(100)
        assert weights.names[-1].endswith("-0.90") and weights.values[-1] == 25
        found = {n: v for n, v in zip(scores.names, scores.values, strict=True) if v}
        assert found == {"0.75-0.81": 50.0, "0.88-0.94": 50.0}

    def test_hits_are_those_of_the_simulation(self, trace: Path) -> None:
        whole = read_trace(trace)
        done = simulate(whole, pools_of(whole, 400), POLICIES["lru"])
        bars = routing.hits(whole, done, "x")
        asked = done.hits + done.misses
        mean = sum(v * asked[whole.group == g].sum() for g, v in enumerate(bars.values)) / 100
        assert mean == pytest.approx(done.hits.sum()) and 0 < mean < asked.sum()

    def test_of_a_trace(self, trace: Path) -> None:
        found, lines = said(trace)
        assert [type(p) for p in found] == [Heat, Bars, Bars, Bars] and lines == []
        assert found[-1].title == "hits by layer: a cache of 100 B, decay"
        (hits,), _ = said(trace, only=["hits"], budget="100%")
        assert isinstance(hits, Bars) and min(hits.values) > 80 > max(found[-1].values)  # type: ignore[union-attr]
        (few,), _ = said(trace, only=["experts"], tokens=10)
        assert isinstance(few, Heat) and np.allclose(few.values.sum(axis=1), 400)

    def test_a_trace_without_weights(self, tmp_path: Path) -> None:
        path = pseudo_trace(tmp_path / "t", tokens=9, weights=False)
        found, lines = said(path)
        assert [type(p) for p in found] == [Heat, Bars]
        assert [line.split(":")[0] for line in lines] == ["no weights", "no scores"]
        with pytest.raises(UsageError, match="no gate weights"):
            said(path, only=["scores"])

    def test_an_unknown_picture(self, trace: Path) -> None:
        with pytest.raises(UsageError, match="--only heat: must be one of experts, weights"):
            said(trace, only=["heat"])


class TestReports:
    def write(self, path: Path, data: Any) -> Path:
        file = path / "r.json"
        file.write_text(json.dumps(data))
        return file

    def test_a_run(self, tmp_path: Path) -> None:
        parts = {"experts": 20.0, "waiting": 10.5, "cache": 0.5}
        (bars,) = of_json(self.write(tmp_path, {"schema": "hobbit.run/1", "token": parts}))
        assert bars == Bars("a token's time: 31.0 ms", (*parts,), (*parts.values(),), "ms")

    def test_a_bench(self, tmp_path: Path) -> None:
        def row(mode: str, total: float, compute: float | None) -> dict[str, Any]:
            names = ("stall_s", "predict_s", "manage_s", "rest_s")
            parts = {"total_s": total, "compute_s": compute, **dict.fromkeys(names, 0.001)}
            return {"mode": mode, "test": "tg8", "breakdown": parts}

        rows = [row("exact", 0.04, 0.036), row("stock", 1.0, None), row("fast", 0.014, 0.01)]
        exact, fast = of_json(self.write(tmp_path, rows))
        assert isinstance(exact, Bars) and isinstance(fast, Bars)
        assert exact.title == "exact, tg8: a token's time: 40.0 ms"
        assert exact.full == fast.full == 40 and fast.values == pytest.approx((10, 1, 1, 1, 1))
        with pytest.raises(UsageError, match="stock does not"):
            of_json(self.write(tmp_path, rows[1:2]))

    def test_an_evaluation(self, tmp_path: Path) -> None:
        modes = [asdict(m) | {"mode": m.name} for m in MARKS] + [
            {"mode": "x", "bytes_per_token": 1, "kl": None, "kl_se": None}  # infinite
        ]
        (points,) = of_json(self.write(tmp_path, {"schema": "hobbit.eval/1", "modes": modes}))
        assert isinstance(points, Points) and points.marks == MARKS

    def test_a_calibration(self, tmp_path: Path) -> None:
        from hobbit.calibration import save

        path = tmp_path / "c.json"
        save(CALIBRATION, path)
        (points,) = of_json(path)
        assert isinstance(points, Points) and points.marks[0].name == "exact" and points.curve

    @pytest.mark.parametrize("data", [1, [], {}, [{}], {"token": {}}, {"schema": "hobbit.x/1"}])
    def test_nothing_to_draw(self, data: Any, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nothing in it can be drawn"):
            of_json(self.write(tmp_path, data))

    @pytest.mark.parametrize(
        "data",
        [
            {"token": [1]},
            {"token": {"a": "b"}},
            [{"breakdown": 1}],
            [{"breakdown": {"compute_s": 1}}],
            {"schema": "hobbit.eval/1"},
            {"schema": "hobbit.eval/1", "modes": [{"mode": "x"}]},
            {"quantiles": []},
        ],
    )
    def test_damage_is_one_clear_error(self, data: Any, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"r\.json"):
            of_json(self.write(tmp_path, data))

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"\xff\xfe")
        for path, words in ((tmp_path / "a", "nothing in it"), (tmp_path / "b", "cannot read")):
            with pytest.raises(UsageError, match=words):
                said(path)


class TestTerminal:
    def test_shades(self) -> None:
        assert text(PICTURES[:1]) == [
            "who is used",
            "layer 0    ░░░███",
            "layer 1 ▒▒▒░░░",
            "0  ░░▒▒▓▓██ 40.0 %",
        ]

    def test_bars_to_an_eighth(self) -> None:
        (title, first, second) = text(PICTURES[1:2], 40)
        assert title == "weights"
        assert first == f"0.0-0.5 {'█' * 25} 75.0 %"
        assert second == f"0.5-1.0 {'█' * 8}▍ 25.0 %"  # a third of 25
        assert text([Bars("x", ("a",), (1.0,), full=8)], 20)[1] == "a █▌ 1.0 %"
        assert text(PICTURES[2:3])[2].split() == ["layer", "1", "-"]

    def test_points(self) -> None:
        lines = text(PICTURES[3:], 60)
        assert lines[1].startswith(" 0.2000 ┤") and lines[12].startswith(" 0.0200 ┤")
        assert sum(line.count("·") for line in lines) == 2
        (mark,) = [line for line in lines if "┤" in line and "B" in line]
        assert abs(mark.index("B") - 9 - 2 * 50 // 3) <= 1  # two thirds of 75 MiB
        assert lines[-2:] == [
            "A exact: KL 0 (not in the diagram), 100 MiB",
            "B fast: KL 0.0700, 50.0 MiB",
        ]

    def test_more_experts_than_columns(self) -> None:
        heat = Heat("x", ("layer 10",), np.arange(256.0)[None, :], "expert")
        lines = text([heat], 40)
        assert len(lines[1]) <= 40 and lines[-1].endswith(", 9 experts a column")

    @pytest.mark.parametrize("width", [20, 40, 80, 200])
    def test_nothing_is_wider(self, width: int, trace: Path) -> None:
        lines = text([*PICTURES, *said(trace)[0]], width)
        assert max(map(len, lines)) <= width

    def test_nothing_but_zeros(self) -> None:
        empty: list[Picture] = [
            Heat("a", ("l",), np.zeros((1, 4)), "expert"),
            Bars("b", ("l",), (0.0,)),
            Points("c", MARKS[:1]),
        ]
        assert "l  0.0 %" in [line.replace("   ", " ") for line in text(empty)]


class TestCommand:
    def test_on_a_pipe(self, trace: Path) -> None:
        done = hobbit("plot", trace)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.startswith("experts: share of the tokens")
        assert "\x1b" not in done.stdout and "hits by layer" in done.stdout

    @pytest.mark.parametrize("columns", [40, 80])
    @pytest.mark.parametrize("plain", [True, False])
    def test_on_a_terminal(self, columns: int, plain: bool, trace: Path) -> None:
        """A real one: with colours, unless NO_COLOR says no, and no line that wraps."""
        environment = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
        environment |= {"NO_COLOR": "1"} if plain else {}
        shown = on_terminal(["plot", str(trace)], environment)
        assert ("\x1b[38;5;" in shown) is not plain
        lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
        assert columns // 2 < max(map(len, lines)) <= columns
        assert any(re.match(r"layer 0 +[█░▒▓ ]+$", line) for line in lines)

    def test_a_png(self, trace: Path, tmp_path: Path) -> None:
        pixels = pytest.importorskip("matplotlib.image")
        dest = tmp_path / "p.png"
        done = hobbit("plot", trace, "-o", dest)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        image = pixels.imread(dest)
        assert image.shape == (1350, 2100, 4)
        quarters = [image[:675, :1050], image[:675, 1050:], image[675:, :1050], image[675:, 1050:]]
        assert all(len(np.unique(quarter)) > 10 for quarter in quarters)
        only = hobbit("plot", trace, "--only", "experts", "-o", dest)
        assert only.returncode == 0 and pixels.imread(dest).shape == (675, 1050, 4)

    def test_refusals(self, trace: Path, tmp_path: Path) -> None:
        for arguments, words in (
            ((tmp_path / "absent",), "cannot read"),
            ((trace, "--only", "x"), "must be one of"),
            ((trace, "--only", "hits", "--budget", "1"), "too small"),
            ((trace, "-o", tmp_path / "absent" / "p.png"), "cannot write"),
        ):
            done = hobbit("plot", *arguments)
            assert done.returncode in (1, 2) and done.stdout == ""
            assert words in done.stderr and len(done.stderr.splitlines()) == 1


def on_terminal(words: list[str], environment: dict[str, str]) -> str:
    """Return what hobbit writes to a terminal of its own."""
    import pty
    import sys

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hobbit", *words]
    with subprocess.Popen(
        command, stdout=theirs, stdin=theirs, stderr=theirs, env=os.environ | environment
    ) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            parts.append(part)
    os.close(ours)
    assert process.returncode == 0
    return b"".join(parts).decode()
