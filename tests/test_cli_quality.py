"""Lossy modes from the command line: prepare, then run with -Q, --t1, --record and the like."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from gates import layout_of
from mixed import steps_of
from moefile import write_moe
from test_calibration import CALIBRATION
from test_cli import hobbit

from hobbit.calibration import path_of, save
from hobbit.fingerprint import fingerprint
from hobbit.low_file import low_path
from hobbit.prepare import make_low

RUN = ("the cat is on a mat", "-n", "40", "-c", "256", "-t", "1", "-s", "1", "--temp", "0.9")
DIAL = ("--t1", "0.35", "--t2", "0.75")


def words_only(name: str, values: tiny.Values) -> tiny.Values:
    if name == "output.weight":
        values[:259] = 0.0
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 96 experts that take 75 MB, beside its low copy, not calibrated."""
    path = tmp_path_factory.mktemp("cli") / "m.gguf"
    tiny.make(
        path, "qwen3moe", "F16", change=words_only,
        n_embd=256, n_ff=512, n_expert=32, n_used=4,
    )  # fmt: skip
    layout = layout_of(path)
    make_low(layout, low_path(layout.gguf), "q4_0")
    return path


@pytest.fixture(scope="module")
def floor(model: Path) -> str:
    """The smallest cap that works, as the error says it."""
    refused = hobbit("run", model, *RUN, "--memory", "16M")
    assert refused.returncode == 4
    return re.findall(r"the smallest cap that works is --memory (\d+M)", refused.stderr)[0]


@pytest.fixture
def calibrated(model: Path) -> Iterator[Path]:
    layout = layout_of(model)
    file = path_of(low_path(layout.gguf))
    save(replace(CALIBRATION, source=fingerprint(layout.gguf)), file)
    yield model
    file.unlink()


def text_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_deterministic_across_caps(model: Path, floor: str) -> None:
    """The same bytes with 4 experts cached and with all; without it they are not the same."""
    caps = (("--memory", floor), ("--memory", "1G"), ("--memory", floor, "--io", "buffered"))
    texts = {text_of(hobbit("run", model, *RUN, *DIAL, "--deterministic", *cap)) for cap in caps}
    assert len(texts) == 1 and len(min(texts).split()) > 10
    adaptive = {text_of(hobbit("run", model, *RUN, *DIAL, *cap)) for cap in caps[:2]}
    assert len(adaptive) == 2
    exact = {text_of(hobbit("run", model, *RUN, *cap)) for cap in caps[:2]}
    assert len(exact) == 1
    assert len(exact | texts) == 2


def test_record_and_replay(model: Path, floor: str, tmp_path: Path) -> None:
    """What ran with half of the experts cached runs again at the floor."""
    schedule = tmp_path / "schedule"
    some = f"{int(floor[:-1]) + 32}M"
    recorded = hobbit("run", model, *RUN, *DIAL, "--memory", some, "--record", schedule)
    assert len({p for _, experts in steps_of(schedule) for _, p in experts}) == 3
    plain = hobbit("run", model, *RUN, *DIAL, "--memory", floor)
    replay = ("--memory", floor, "--replay", schedule)
    replayed = hobbit("run", model, *RUN, *DIAL, *replay)
    assert text_of(replayed) == text_of(recorded) != text_of(plain)
    other = hobbit("run", model, *RUN, *DIAL, *replay, "-s", "2")
    assert (other.returncode, other.stderr.count("departs from the replayed")) == (1, 1)
    assert "Traceback" not in other.stderr
    longer = hobbit("run", model, *RUN, *DIAL, *replay, "-n", "60")
    assert longer.returncode == 1
    assert "the replayed precision schedule ends here" in longer.stderr.splitlines()[-1]


def test_what_is_told(model: Path, floor: str) -> None:
    done = hobbit("run", model, *RUN, *DIAL, "--memory", floor)
    mode, last = done.stderr.splitlines()[1], done.stderr.splitlines()[-1]
    assert mode.startswith("mode: ") and "T1 0.35, T2 0.75" in mode
    assert re.search(r"\| T1 0.35, T2 0.75 \| high \d+ % low \d+ % skip \d+ % \| hit \d+ %", last)
    report = json.loads(text_of(hobbit("run", model, *RUN, *DIAL, "--memory", floor, "--json")))
    assert report["quality"]["name"] == "T1 0.35, T2 0.75"
    assert report["quality"]["low_file"] == str(low_path(layout_of(model).gguf))
    assert (report["quality"]["rule"]["t1"], report["quality"]["kl"]) == (0.35, None)
    experts = report["experts"]
    pairs = [experts[f"pairs_{name}"] for name in ("high", "low", "skip")]
    assert all(pairs) and sum(pairs) == experts["scored"]
    assert experts["unscored"] == 0 < experts["bytes_read_low"] < experts["bytes_read"]
    assert report["memory"]["peak_bytes"] <= report["memory"]["cap_bytes"]


def test_a_named_mode(calibrated: Path, floor: str) -> None:
    done = hobbit("run", calibrated, *RUN, "-Q", "fast", "--memory", floor, "--json")
    quality = json.loads(text_of(done))["quality"]
    assert quality["name"] == "fast"
    assert "fast" in done.stderr.splitlines()[1]
    budget = hobbit("run", calibrated, *RUN, "-Q", "0.08", "--memory", floor, "--json")
    assert json.loads(text_of(budget))["quality"] == quality | {"name": "KL 0.08"}


def test_resident_low(model: Path, floor: str) -> None:
    refused = hobbit("run", model, *RUN, *DIAL, "--memory", floor, "--resident-low", "on")
    assert refused.returncode == 4
    typed = re.findall(r"the smallest that works is --memory (\d+M)", refused.stderr)[0]
    options = ("--memory", typed, "--resident-low", "on", "--json")
    report = json.loads(text_of(hobbit("run", model, *RUN, *DIAL, *options)))
    assert report["plan"]["low_is_resident"] is True
    assert report["experts"]["stand_ins"] > 0
    assert report["memory"]["peak_bytes"] <= report["memory"]["cap_bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-Q", "fast"), 3, "is not calibrated, so that no mode is known to keep its promise"),
        (("-Q", "best"), 2, "best: a quality is exact, high, balanced, fast or a KL budget"),
        (("-Q", "fast", "--t1", "0.5"), 2, "two ways to say the same: give one"),
        (("--t1", "0.9", "--t2", "0.5"), 2, "T1 is 0.9 and T2 is 0.5: T1 must not be above T2"),
        (("--low-file", "none.gguf", "--t1", "0.5"), 3, "none.gguf: no such file"),
        (("--resident-low", "on"), 2, "resident low copies are for a lossy quality"),
        (("--resident-low", "maybe"), 2, "--resident-low maybe: must be one of auto, on, off"),
        (("--record", "a", "--replay", "b"), 2, "a run does one of the two"),
        (("--record", "/none/x"), 1, "/none/x: No such file or directory"),
        (("--replay", "/none/x"), 2, "cannot read /none/x: No such file or directory"),
        (("--replay", "/dev/null"), 3, "is not a precision schedule, as --record writes it"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], code: int, words: str, model: Path, floor: str
) -> None:
    done = hobbit("run", model, *RUN, "--memory", floor, "-q", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert done.stderr.startswith("hobbit: error: ")
    assert done.stderr.count("\n") == 1


def test_models_without_what_it_takes(tmp_path: Path) -> None:
    dense = write_moe(tmp_path / "d.gguf", dense=True)
    bare = write_moe(tmp_path / "bare.gguf", kind="Q8_0")
    for path, words, code in (
        (dense, "has no experts that stream: only -Q exact makes sense", 2),
        (bare, "has no low-precision copy of its experts yet: run hobbit prepare", 3),
    ):
        for asked in (("-Q", "fast"), ("--t1", "0.5")):
            done = hobbit("run", path, "x", *asked, "-q")
            assert (done.returncode, done.stderr.count("\n")) == (code, 1)
            assert words in done.stderr


def test_prepare_then_run(tmp_path: Path) -> None:
    """All of the way: importance, copy, calibration, and a mode that holds."""
    path = tmp_path / "words.gguf"
    tiny.make(path, "qwen3moe", n_used=4, change=words_only)
    text = tmp_path / "text"
    text.write_text("it is the end of a day and they were not at home with you by the " * 90)
    prepared = hobbit("prepare", path, "-f", text, "-t", "1", "--memory", "1G")
    assert prepared.returncode == 0, prepared.stderr
    low = low_path(layout_of(path).gguf)
    assert low.exists() and path_of(low).exists()
    lines = prepared.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "mode", "exact", "high", "balanced", "fast", "all",
    ]  # fmt: skip
    assert "gathering the importance" in prepared.stderr
    done = hobbit("run", path, *RUN, "-Q", "9", "--memory", "1G", "--json")
    report = json.loads(text_of(done))
    assert report["quality"]["name"] == "KL 9"
    assert report["experts"]["pairs_low"] + report["experts"]["pairs_skip"] > 0
    # A second time there is nothing to do.
    again = hobbit("prepare", path, "-t", "1", "--memory", "1G")
    assert again.returncode == 0
    assert f"{low}: is made already" in again.stderr
    assert again.stdout == prepared.stdout


def test_prepare_nested(tmp_path: Path) -> None:
    """One file that needs no other: exact's text, and modes by hand."""
    path, copy = tmp_path / "words.gguf", tmp_path / "words.hobbit-nested.gguf"
    tiny.make(path, "qwen3moe", "Q8_0", n_used=4, change=words_only)
    made = hobbit("prepare", path, "--nested", "--imatrix", "none", "--no-calibrate", "-t", "1")
    assert made.returncode == 0, made.stderr
    assert f"{copy}: " in made.stderr and "is not needed beside it" in made.stderr
    expected = text_of(hobbit("run", path, *RUN, "--memory", "1G"))
    path.rename(tmp_path / "elsewhere")
    assert text_of(hobbit("run", copy, *RUN, "--memory", "1G")) == expected
    report = json.loads(text_of(hobbit("run", copy, *RUN, "--t1", "0.1", "--json")))
    assert report["experts"]["pairs_low"] > 0
    assert report["quality"]["low_file"] == str(copy)
    again = hobbit("prepare", copy, "--nested", "--no-calibrate", "-q", "-o", tmp_path / "twice")
    assert (again.returncode, again.stderr.count("\n")) == (3, 1)
    assert "is a nested copy already" in again.stderr
    both = hobbit("prepare", copy, "--nested", "--low", "q4_0")
    assert (both.returncode, both.stderr.count("\n")) == (2, 1)
