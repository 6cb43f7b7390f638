"""`hobbit eval` as a process, on a tiny model with a low copy."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
from test_calibration import CALIBRATION
from test_cli import hobbit, started, wait_for

from hobbit.calibration import path_of, save
from hobbit.cli.eval import evaluate
from hobbit.evaluate import Row
from hobbit.fingerprint import fingerprint
from hobbit.gguf_file import open_gguf
from hobbit.low_file import low_path
from hobbit.options import EvalOptions

FAST = ("--tokens", "192", "--window", "96", "-t", "1", "--memory", "1G")
WORDS = "it is the end of a day and they were not at home "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose low copy hobbit prepared, at its usual place."""
    path = tiny.make_text_model(tmp_path_factory.mktemp("eval") / "m.gguf")
    done = hobbit("prepare", path, "--low", "q4_0", "--no-calibrate", "-t", "1")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def bare(model: Path, tmp_path: Path) -> Path:
    """The same model without a low copy."""
    return Path(shutil.copy(model, tmp_path / "bare.gguf"))


def test_table(model: Path) -> None:
    done = hobbit("eval", model, *FAST, "--mode", "0:0", "--mode", "all-low")
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head[0] == "mode" and [row[0] for row in rows] == ["exact", "0:0", "all-low"]
    assert float(rows[0][1]) == 0 and float(rows[1][1]) > 0 and float(rows[2][1]) > 0
    assert "all-low: 100 %" not in done.stdout and "all-low" in done.stderr


def test_json(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(WORDS * 40)
    done = hobbit("eval", model, *FAST, "-f", text, "--json", "--deterministic", "--mode", "0:1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "hobbit.eval/1"
    assert report["text"] == str(text) and report["low"] == str(low_path(open_gguf(model)))
    exact, low = report["modes"]
    assert set(exact) == set(Row.__dataclass_fields__)
    assert (exact["mode"], low["mode"]) == ("exact", "0:1")
    assert (exact["kl"], exact["top1"], exact["high"]) == (0, 1, 1)
    assert low["rule"]["deterministic"] and low["kl"] > 0
    assert (low["high"], low["low"], low["skipped"]) == (0.5, 0.5, 0)  # two experts a token
    assert report["tasks"] == []


def test_max_kld_has_its_own_exit_code(model: Path) -> None:
    asked = ("eval", model, *FAST, "--mode", "all-low", "-q")
    done = hobbit(*asked, "--max-kld", "1e-9")
    assert done.returncode == 6
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr.startswith("hobbit: error: all-low: mean KL ")
    assert len(done.stderr.splitlines()) == 1
    assert hobbit(*asked, "--max-kld", "99").returncode == 0
    assert hobbit("eval", model, *FAST, "--mode", "exact", "--max-kld", "0").returncode == 0


def test_what_a_model_is_prepared_for_is_the_default(model: Path, bare: Path) -> None:
    def names(path: Path) -> list[str]:
        done = hobbit("eval", path, *FAST, "-q")
        assert done.returncode == 0, done.stderr
        return [line.split()[0] for line in done.stdout.splitlines()[1:]]

    assert names(bare) == ["exact"]
    assert names(model) == ["exact", "all-low"]
    low = Path(shutil.copy(low_path(open_gguf(model)), low_path(open_gguf(bare))))
    calibration = replace(CALIBRATION, source=fingerprint(open_gguf(bare)))
    save(calibration, path_of(low))
    assert names(bare) == ["exact", "high", "balanced", "fast"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "best"), "unknown mode 'best': use exact"),
        (("--mode", "all-low"), "there is no low copy of the experts; run: hobbit prepare"),
        (("--t1", "0.5"), "there is no low copy of the experts; run: hobbit prepare"),
        (("--mode", "balanced"), "the model is not calibrated; run: hobbit prepare"),
        (("--t1", "0.9", "--t2", "0.5"), "T1 must not be above T2"),
        (("-f", "/absent.txt"), "cannot read /absent.txt: No such file"),
        (("--tokens", "70"), "a limit of 70 tokens is too low: "),
        (("--tokens", "0"), "--tokens 0 measures nothing without --tasks"),
        (("--tasks", "/absent.jsonl"), "cannot read /absent.jsonl"),
        (("-c", "64"), "-c 64: a window of 96 tokens does not fit"),
        (("--memory", "huge"), "huge"),
        (("--plot", "/absent/p.png"), "cannot write /absent/p.png"),
    ],
)
def test_errors_are_one_line(bare: Path, arguments: tuple[str, ...], message: str) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    done = hobbit("eval", bare, *FAST, "-q", *arguments)
    assert done.returncode in (1, 2), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("hobbit: error: ") and message in line


def test_a_short_text_says_how_short(bare: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the end")
    done = hobbit("eval", bare, *FAST, "-q", "-f", text)
    assert done.returncode == 2
    assert "64 are needed" in done.stderr and len(done.stderr.splitlines()) == 1


def test_tasks(model: Path, tmp_path: Path) -> None:
    lines = [
        {"question": f"is it {n}?", "choices": ["it is", "not at all", "by the"], "answer": 0}
        for n in range(3)
    ]
    task = tmp_path / "t.jsonl"
    task.write_text("\n".join(map(json.dumps, lines)))
    asked = ("eval", model, "--tokens", "0", "--tasks", task, "-t", "1", "--memory", "1G", "-q")
    done = hobbit(*asked, "--mode", "all-low", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["modes"] == []
    (found,) = report["tasks"]
    assert found["file"] == str(task)
    assert [(row["mode"], row["n"]) for row in found["modes"]] == [("exact", 3), ("all-low", 3)]
    assert found["modes"][0]["agreement"] == 1
    done = hobbit(*asked)
    assert done.stdout.splitlines()[0] == str(task)


def test_ctrl_c_stops_it(bare: Path) -> None:
    """In the middle of decoding, with the model closed in an orderly way."""
    with started("eval", bare, "--tokens", "100000", "-t", "1", "--memory", "1G") as process:
        wait_for(process.stderr, b"exact")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == b"hobbit: error: interrupted"


def test_a_plot(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = hobbit("eval", model, *FAST, "--plot", tmp_path / "p.png", "-q")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_every_option_has_a_flag() -> None:
    parameters = inspect.signature(evaluate).parameters
    assert [*parameters] == [field.name for field in fields(EvalOptions)]
    for name, parameter in parameters.items():
        default = getattr(EvalOptions(), name)
        assert (name, parameter.default) == (name, None if default == () else default)
