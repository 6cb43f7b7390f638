"""hobbit plan, run and why as commands: what they print, and how they hang together."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import sparse
import tiny
from doclines import commands
from gates import layout_of
from gguf import GGMLQuantizationType as Q
from test_cli import SMALL, hobbit
from test_docs import TEXTS
from test_why import record

import hobbit as package
from hobbit import disk
from hobbit.calibration import Point
from hobbit.folders import recall, remember, state_folder
from hobbit.layout import LowCopies
from hobbit.memory import Cap
from hobbit.models.catalogue import known_models
from hobbit.planning import machine
from hobbit.planning.estimate import EXPONENTS, hit_rate
from hobbit.planning.feedback import LAST_RUN, SCHEMA
from hobbit.planning.machine import _key
from hobbit.planning.parts import Context
from hobbit.planning.planner import WONT_FIT, forecast_of
from hobbit.planning.subject import Subject
from hobbit.quality import Quality
from hobbit.rule import ALL_LOW, EXACT, Rule

READ = ("--read-gbps", "1", "-t", "1", "-q")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 GiB that takes no room."""
    folder = tmp_path_factory.mktemp("plan")
    shape = {"n_expert": 64, "n_used": 4, "n_embd": 2048, "n_ff": 1024, "n_layer": 8, "n_head": 16}
    return sparse.make(folder / "big.gguf", "olmoe", **shape)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("plan") / "m.gguf")


@pytest.fixture(autouse=True)
def known_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: how fast that is would decide the tests."""
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOBBIT_STATE", str(tmp_path / "state"))
    known(1e10)


def known(speed: float) -> None:
    """Remember so many bytes a second of every type of weights."""
    date = datetime.now(timezone.utc).isoformat()
    speeds = {"decode": speed, "prompt": 5 * speed, "date": date}
    remember(disk.FILE, {"compute": {_key(kind, 1): speeds for kind in (0, 1, 2, 8)}})


def test_a_plan_says_whether_and_how_fast(big: Path) -> None:
    done = hobbit("plan", big, "--memory", "2G", *READ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(
        r"^verdict: (FAST|GOOD|USABLE|SLOW), [\d.]+ \([\d.]+-[\d.]+\) tok/s", done.stdout, re.M
    )
    for words in ("dense", "experts", "cap", "floor:", "hits:", "first token:", "everything"):
        assert words in done.stdout
    assert (
        "given disk, measured processor, assumed hit rate, which a run here would tell"
        in done.stdout
    )


def test_a_plan_as_json(big: Path) -> None:
    done = hobbit("plan", big, "--memory", "2G", "--json", *READ)
    plan = json.loads(done.stdout)
    assert (plan["schema"], plan["fits"]) == ("hobbit.plan/1", True)
    low, high = plan["tok_s"]
    assert 0 < low < plan["estimate"]["tok_s"]["mid"] < high
    memory = plan["memory"]
    assert sum(line["bytes"] for line in memory["lines"]) + memory["spare_bytes"] == 2 << 30
    speeds = [row["estimate"]["tok_s"]["mid"] for row in plan["table"] if row["estimate"]]
    assert speeds == sorted(speeds)


def test_what_does_not_fit_names_the_cap_that_does(big: Path) -> None:
    done = hobbit("plan", big, "--memory", "100M", *READ)
    assert done.returncode == 4
    assert WONT_FIT in done.stdout
    found = re.search(r"the smallest cap that works is --memory (\d+)M", done.stderr)
    assert found
    assert hobbit("plan", big, "--memory", f"{found[1]}M", *READ).returncode == 0
    assert hobbit("plan", big, "--memory", f"{int(found[1]) - 17}M", *READ).returncode == 4
    failed = hobbit("plan", big, "--memory", "100M", "--json", *READ)
    assert failed.returncode == 4
    assert json.loads(failed.stdout)["needed_bytes"] <= int(found[1]) << 20


def test_the_memory_for_a_speed(big: Path) -> None:
    done = hobbit("plan", big, "--memory", "2G", "--for", "12", "--json", *READ)
    wanted = json.loads(done.stdout)["for"]
    assert wanted["estimate"]["tok_s"]["mid"] == pytest.approx(12, rel=0.02)
    size = f"{wanted['cap_bytes'] >> 20}M"
    again = json.loads(hobbit("plan", big, "--memory", size, "--json", *READ).stdout)
    assert again["estimate"]["tok_s"]["mid"] >= 12
    never = hobbit("plan", big, "--for", "100000", *READ)
    assert never.returncode == 4
    assert "no memory gives 100000 tok/s here" in never.stderr


def test_a_faster_disk_and_a_smaller_context_are_faster(big: Path) -> None:
    def speed(*more: str) -> float:
        done = hobbit("plan", big, "--memory", "2G", "-t", "1", "-q", "--json", *more)
        mid: float = json.loads(done.stdout)["estimate"]["tok_s"]["mid"]
        return mid

    slow = speed("--read-gbps", "0.2")
    assert speed("--read-gbps", "2") > slow
    assert speed("--read-gbps", "0.2", "-c", "512") > slow
    assert speed("--read-gbps", "0.2", "-ctk", "q8_0", "-ctv", "q8_0") > slow


def test_flags_of_llama_server(big: Path) -> None:
    words = hobbit("plan", big, "--llama-cpp", "-c", "2000", *READ).stdout.split()
    assert words[:3] == ["llama-server", "-m", str(big)]
    assert words[words.index("-c") + 1] == "2048"
    assert words[words.index("-t") + 1] == "1"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--vram", "8X"), 2), (("-ctk", "q9"), 2), (("--read-gbps", "0"), 2), (("-Q", "fast"), 3)],
)
def test_what_cannot_be_planned_is_one_line(
    big: Path, arguments: tuple[str, ...], code: int
) -> None:
    done = hobbit("plan", big, *arguments)
    assert done.returncode == code
    assert done.stderr.startswith("hobbit: error: ")
    assert "Traceback" not in done.stderr
    assert hobbit("plan", "/nowhere/m.gguf").returncode == 3


def test_a_plan_takes_less_than_a_second(big: Path) -> None:
    start = time.perf_counter()
    package.plan(big, "2G", n_threads=1, read_gbps=1.0, for_tok_s=10)
    assert time.perf_counter() - start < 1


def test_a_plan_in_python(big: Path) -> None:
    plan = package.plan(big, memory="2G", n_threads=1, read_gbps=1.0)
    assert plan.fits
    assert plan.reason == "it fits"
    assert plan.limit in ("disk", "compute")
    assert plan.tok_s[0] < plan.tok_s[1]
    assert plan.memory is not None
    assert plan.memory.cap.bytes == 2 << 30
    json.dumps(plan.to_dict())
    small = package.plan(big, memory="100M", n_threads=1, read_gbps=1.0)
    assert (small.fits, small.tok_s, small.limit) == (False, (0.0, 0.0), "memory")
    assert "--memory" in small.reason


def test_a_model_without_experts_is_planned(tmp_path: Path) -> None:
    from moefile import write_moe

    path = tmp_path / "dense.gguf"
    write_moe(path)
    plan = package.plan(path, "8G", n_threads=1, read_gbps=1.0)
    assert plan.fits


def test_a_run_tells_plan_and_why(text_model: Path, tmp_path: Path) -> None:
    nothing = hobbit("why")
    assert nothing.returncode == 1
    assert "no run has ended here yet" in nothing.stderr
    # the disk of the model is measured; the processor is known already, and is said to be slow
    known(1e6)
    first = hobbit("plan", text_model, "-t", "1", "-c", "256")
    assert "no run here yet" in first.stdout
    done = hobbit("run", text_model, "-p", "the", "-n", "40", "--temp", "0", *SMALL)
    assert re.search(r"^expect [\d.]+-[\d.]+ tok/s, first token ~[\d.]+ s", done.stderr, re.M)
    assert re.search(r"predicted [\d.]+-[\d.]+: above, see hobbit why\]$", done.stderr.strip())
    second = hobbit("plan", text_model, "-t", "1", "-c", "256")
    assert re.search(r"the last run here was \+\d+ %", second.stdout)
    why = hobbit("why")
    assert why.returncode == 0
    assert why.stdout.startswith(f"{text_model}: ")
    assert len(re.findall(r"^ *\d+ % - ", why.stdout, re.M)) == 5
    assert json.loads(hobbit("why", "--json").stdout)["schema"] == "hobbit.why/1"


def test_a_short_run_says_nothing_of_the_prediction(text_model: Path) -> None:
    hobbit("plan", text_model, "-t", "1", "-c", "256")
    hobbit("run", text_model, "-p", "the", "-n", "8", *SMALL)
    assert "no run here yet" in hobbit("plan", text_model, "-t", "1", "-c", "256").stdout
    assert hobbit("why").returncode == 0


def test_a_state_that_cannot_be_written_is_no_matter(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOBBIT_STATE", "/proc/nowhere")
    done = hobbit("run", text_model, "-p", "the", "-n", "4", *SMALL)
    assert done.returncode == 0
    assert "error" not in done.stderr


def test_doctor_is_well_here() -> None:
    done = hobbit("doctor", "--quick", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["ok"]
    assert {"processor", "memory", "swap", "build", "plugin", "direct reads"} <= {
        check["name"] for check in report["checks"]
    }


def test_doctor_fails_on_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = hobbit("doctor", tmp_path / "nowhere", "--quick")
    assert done.returncode == 6
    assert "FAIL  disk" in done.stdout


def test_every_known_model_is_planned_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(machine, "_measured", lambda kind, n: {"decode": 1e10, "prompt": 5e10})
    names = [name for name in known_models() if name != "demo"]
    assert len(names) >= 15
    for name in names:
        speeds = []
        for memory in ("4G", "8G", "16G", "32G"):
            start = time.perf_counter()
            plan = package.plan(name, memory, n_threads=4, read_gbps=2.0)
            assert time.perf_counter() - start < 1, name
            assert plan.forecast.subject.estimated
            assert plan.fits == (plan.needed_bytes <= plan.cap.bytes)
            speeds.append(plan.tok_s[1])
        assert speeds == sorted(speeds), name
        assert speeds[-1] > 0
        json.dumps(plan.to_dict())


def test_a_lossy_quality_is_planned_with_its_low_copies(tmp_path: Path) -> None:
    shape = {"n_expert": 16, "n_used": 2, "n_embd": 512, "n_ff": 512, "n_layer": 4}
    layout = layout_of(sparse.make(tmp_path / "m.gguf", "olmoe", experts=Q.Q8_0, **shape))
    half = layout_of(sparse.make(tmp_path / "low.gguf", "olmoe", experts=Q.Q4_0, **shape))
    low = LowCopies(half.gguf, half.groups)
    rule = Rule(1.0, 1.0)
    quality = Quality("fast", rule, low, all_low=Point(rule, 0.1, 0.1, 0, 0, 1.0, 0, 1, 0))
    found = Subject("m", layout, None)
    forecast = forecast_of(found, Context(256, 256), quality, 1, read_gbps=0.05)
    exact = forecast_of(found, Context(256, 256), Quality("exact", EXACT), 1, read_gbps=0.05)
    cap = Cap(forecast.everything - (24 << 20), "as asked")
    resident = forecast.memory(cap)
    assert resident.low_is_resident
    assert forecast.expect(resident).disk_s == 0.0
    assert exact.expect(exact.memory(cap)).disk_s > 0


def test_a_quality_that_needs_much_is_planned_where_it_has_it(tmp_path: Path) -> None:
    shape = {"n_expert": 16, "n_used": 2, "n_embd": 512, "n_ff": 512, "n_layer": 4}
    layout = layout_of(sparse.make(tmp_path / "m.gguf", "olmoe", experts=Q.Q8_0, **shape))
    half = layout_of(sparse.make(tmp_path / "low.gguf", "olmoe", experts=Q.Q4_0, **shape))
    low, rule = LowCopies(half.gguf, half.groups), Rule(0.5, 1.0, patience=4)
    quality = Quality("fast", rule, low, measured=True)  # and below half nothing keeps it
    found = Subject("m", layout, None)
    forecast = forecast_of(found, Context(256, 256), quality, 1, read_gbps=0.05)
    assert forecast.memory(Cap(forecast.everything - (8 << 20), "as asked")).cached_share > 0.5
    small = forecast.row(forecast.smallest, "smallest")
    assert (small.estimate, small.note) == (None, "smallest: too little for this quality")


def test_all_low_is_planned_with_what_fits_of_low_copies(tmp_path: Path) -> None:
    shape = {"n_expert": 16, "n_used": 2, "n_embd": 512, "n_ff": 512, "n_layer": 4}
    layout = layout_of(sparse.make(tmp_path / "m.gguf", "olmoe", experts=Q.Q8_0, **shape))
    half = layout_of(sparse.make(tmp_path / "low.gguf", "olmoe", experts=Q.Q4_0, **shape))
    quality = Quality("low", ALL_LOW, LowCopies(half.gguf, half.groups))
    forecast = forecast_of(Subject("m", layout, None), Context(256, 256), quality, 1, read_gbps=0.1)
    plan = forecast.memory(Cap(forecast.everything - (32 << 20), "as asked"))
    room = 34 / 18  # bytes of a block of each
    assert forecast.expect(plan).hit.mid == pytest.approx(
        hit_rate(min(plan.cached_share * room, 1), EXPONENTS.mid)
    )


def test_other_quantisations_of_a_known_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind in (12, 14):
        everything = recall(disk.FILE)
        compute = everything["compute"]
        remember(disk.FILE, {"compute": compute | {_key(kind, 1): compute[_key(8, 1)]}})
    done = hobbit("plan", "qwen3-30b-a3b:Q4_K_M", "--memory", "8G", *READ)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^about its other quantisations: .*Q8_0 \([\d.]+ GiB\) [\d.]+ tok/s", done.stdout, re.M
    )
    assert re.search(r"Q5_K_M \([\d.]+ GiB\) fits", done.stdout)  # its speed is not known here
    plan = json.loads(hobbit("plan", "qwen3-30b-a3b", "--memory", "1G", "--json", *READ).stdout)
    assert {other["fits"] for other in plan["others"]} == {False}
    assert "Q4_K_M" not in {other["quant"] for other in plan["others"]}


def test_the_commands_of_the_document_work(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOBBIT_READ_GBPS", "1")
    monkeypatch.setenv("HOBBIT_THREADS", "1")
    monkeypatch.setenv("HOBBIT_QUICK", "1")
    for kind in (12, 14):  # of the known model
        everything = recall(disk.FILE)
        compute = everything["compute"]
        remember(disk.FILE, {"compute": compute | {_key(kind, 1): compute[_key(8, 1)]}})
    remember(LAST_RUN, record(schema=SCHEMA), state_folder)
    (tmp_path / "model.gguf").symlink_to(big)
    lines = [*commands(TEXTS["plan.md"])]
    assert len(lines) >= 9
    for line in lines:
        done = hobbit(*line.arguments)
        assert done.returncode == 0, (line, done.stderr)
