"""scripts/edge-bench on a tiny model: a report with its samples and pictures."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import edge_bench
import edge_plots
import pytest
import quality_speed
import tiny

from hobbit.bench import Case
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.low_file import low_path
from hobbit.prepare import make_low
from hobbit.rule import Rule

needs_plots = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@needs_plots
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.make_text_model(tmp_path / "m.gguf", arch="olmoe")
    out = tmp_path / "out"
    asked = ["--quick", "--model-file", str(model), "--out", str(out), "--threads", "1"]
    asked += ["--memory", "none", "--disks", "none"]
    assert edge_bench.main(asked) == 0
    report = Path(capsys.readouterr().out.strip())
    text = report.read_text()
    data = json.loads(report.with_suffix(".json").read_text())
    assert report == out / f"{data['machine']['date']}.md"
    (part,) = data["parts"]
    found = [row for row in part["rows"] if row["test"] == "tg4"]
    modes = [row["mode"] for row in found]
    assert modes == ["exact"] * 4 + ["stock-mmap", "stock"]  # not prepared: without fast
    assert "not prepared" in text and "roofline" in text and "stall" in text
    names = [edge_plots.name_of(row) for row in found]
    assert names == ["exact", "exact\nlru\nnone", "exact\nnone", "exact\ngate:always", *modes[4:]]
    for name in ("rate", "time", "roofline"):
        picture = f"{report.stem}-{name}.png"
        assert f"({picture})" in text
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    stock = part | {"rows": [row for row in found if row["mode"] == "stock"]}
    for draw in edge_bench.PLOTS.values():
        draw([stock], out / "alone.png")
        assert (out / "alone.png").stat().st_size > 0
        (out / "alone.png").unlink()


def test_a_report_of_the_same_day_is_kept(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        stem = edge_bench.free_stem(tmp_path, "2026-11-25")
        stem.with_suffix(".json").touch()
        names.append(stem.name)
    assert names == ["2026-11-25", "2026-11-25-2", "2026-11-25-3"]


@needs_plots
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--quick", "--model-file", str(tmp_path / "absent"), "--out", str(tmp_path)]
    assert edge_bench.main(asked) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edge-bench: ") and "absent" in line


def test_the_arms_of_the_suite() -> None:
    subject = edge_bench.Subject("demo", "demo", Path("m"), "", {"quality": "fast"})
    arms = edge_bench.arms(subject, 1 << 30, edge_bench.ARMS)
    assert [(a.title, a.engine, a.cap) for a in arms] == [
        ("exact", "hobbit", 1 << 30),
        ("exact, lru, none", "hobbit", 1 << 30),
        ("exact, none", "hobbit", 1 << 30),
        ("exact, gate:always", "hobbit", 1 << 30),
        ("fast", "hobbit", 1 << 30),
        ("stock-mmap", "stock-mmap", 1 << 30),
        ("stock", "stock", 0),
    ]
    plain = edge_bench.arms(edge_bench.Subject("o", "o", Path(), ""), 0, ("fast", "stock"))
    assert [a.name for a in plain] == ["stock"]


@needs_plots
def test_the_inflated_demo_gets_the_demos_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.make_text_model(tmp_path / "m.gguf", arch="olmoe")
    make_low(build_layout(open_gguf(model)), low_path(open_gguf(model)), "q4_0")
    small = replace(edge_bench.MODELS["demo"], file=model.name)
    monkeypatch.setitem(edge_bench.MODELS, "demo", small)
    monkeypatch.setitem(quality_speed.MODELS, "demo", small)
    rules = {"fast": Rule(0.0, 0.5)}
    monkeypatch.setattr(quality_speed, "calibrated_rules", lambda *_: (rules, "by a test"))
    monkeypatch.setattr(edge_bench, "CASE", Case(16, 8))
    asked = ["--only", "demo", "--runs", "1", "--threads", "1", "--memory", "none"]
    asked += ["--models-dir", str(tmp_path), "--disks", "none", "--out", str(tmp_path / "out")]
    assert edge_bench.main(asked) == 0
    report = Path(capsys.readouterr().out.strip())
    (part,) = json.loads(report.with_suffix(".json").read_text())["parts"]
    decoding = {row["mode"]: row["samples"][0] for row in part["rows"] if row["n_gen"]}
    assert list(decoding) == ["exact", "fast", "stock-mmap", "stock"]
    assert decoding["fast"]["quality"] == "rule"
    assert "by a test" in part["note"] and part["note"] in report.read_text()
