"""`hobbit bench`: what it runs, what it makes of that, what it prints, on a tiny model."""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import tiny
from test_cli import hobbit, started, wait_for

from hobbit import bench, cgroup
from hobbit.bench import Arm, Case, Measured, Setup, measure, run_arm
from hobbit.bench_arm import COUNTERS
from hobbit.bench_options import BenchOptions, cap_bytes
from hobbit.bench_rows import FORMATS, as_markdown, bound_s, rows
from hobbit.cli import bench as bench_command
from hobbit.errors import CapUnavailable, HobbitError, ModelError, PlanError, UsageError
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.llama import Llama
from hobbit.texts import SAMPLE, path_of

QUICK = ("-p", "24", "-n", "6", "-t", "1", "-r", "1", "--no-roofline")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("bench") / "m.gguf", arch="olmoe")


def setup(model: Path, *arms: Arm, **changes: Any) -> Setup:
    usual = {"text": str(path_of(SAMPLE)), "repetitions": 1, "roofline": False}
    layout = build_layout(open_gguf(model))
    return Setup(layout, arms or (Arm("exact"),), [Case(24, 6)], **usual | changes)


# Runs


def test_a_stock_arm_never_imports_hobbit(model: Path) -> None:
    s = setup(model)
    arms = [Arm("exact"), Arm("stock-mmap", "stock-mmap"), Arm("stock", "stock")]
    samples = [run_arm(s, s.cases[0], arm, 0) for arm in arms]
    assert [sample["imported_hobbit"] for sample in samples] == [True, False, False]
    for key in ("model_type", "model_size", "model_n_params"):
        assert len({sample[key] for sample in samples}) == 1
    for sample in samples:
        assert [len(sample[name]["seconds"]) for name in ("prompt", "decode")] == [1, 6]
        assert [sample[name]["tokens"] for name in ("prompt", "decode")] == [24, 6]
    ours = samples[0]
    assert ours["decode"]["hits"] + ours["decode"]["misses"] > 0
    assert "hits" not in samples[1]["decode"]


def test_a_warm_run_has_the_experts_and_a_cold_one_does_not(model: Path) -> None:
    case = Case(24, 6)
    warm = run_arm(setup(model), case, Arm("exact"), 0)
    cold = run_arm(setup(model, warm=False), case, Arm("exact"), 0)
    assert warm["prompt"]["misses"] == warm["decode"]["misses"] == 0
    assert cold["prompt"]["misses"] > 0


def test_a_prompt_is_fed_in_batches_and_depth_is_not_timed(model: Path) -> None:
    case = Case(24, 0, n_depth=40, n_batch=16, n_ubatch=16)
    sample = run_arm(setup(model, text=""), case, Arm("stock", "stock"), 0)
    assert len(sample["prompt"]["seconds"]) == 2
    assert sample["decode"]["seconds"] == []


def test_an_arm_gets_its_own_arguments(model: Path) -> None:
    every_other = {"rule": {"t1": 0.3, "t2": 0.3}}
    sample = run_arm(setup(model), Case(0, 6), Arm("skips", arguments=every_other), 0)
    assert sample["quality"] == "rule"


def fake_sample(prompt_s: float, decode_s: list[float], **counted: float) -> dict[str, Any]:
    nothing: dict[str, float] = dict.fromkeys((*COUNTERS, "disk_bytes"), 0.0)
    return {
        "load_s": 1.0,
        "model_type": "fake",
        "model_size": 1 << 30,
        "model_n_params": 10**9,
        "prompt": {"seconds": [prompt_s], "tokens": 10, **nothing},
        "decode": {"seconds": decode_s, "tokens": len(decode_s), **nothing, **counted},
        "peak_rss_bytes": 1 << 20,
        "plan": "resident-experts",
        "predictor": "gate",
    }


def test_arms_alternate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def record(setup: Setup, case: Case, arm: Arm, index: int) -> dict[str, Any]:
        order.append((arm.name, index))
        return fake_sample(1.0, [0.5] * 6)

    monkeypatch.setattr(bench, "run_arm", record)
    monkeypatch.setattr(bench, "disk_rate", lambda setup: 1e9)
    arms = (Arm("exact"), Arm("stock", "stock"))
    (found,) = measure(setup(model, *arms, repetitions=3, roofline=True), lambda text: None)
    assert order == [(n, i) for i in range(3) for n in ("exact", "stock", "resident")]
    assert [one.arm.name for one in found] == ["exact", "stock"]
    assert [len(one.samples) for one in found] == [3, 3]
    assert len(found[0].resident) == 3


def test_the_resident_arm_runs_again_beside_reads(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    started: list[bool] = []

    @contextmanager
    def reads(setup: Setup, bytes_per_s: float) -> Iterator[None]:
        rates.append(bytes_per_s)
        started.append(True)
        yield
        started.pop()

    def run(setup: Setup, case: Case, arm: Arm, index: int) -> dict[str, Any]:
        seconds = 0.2 if started else 0.1
        missed = {"read_bytes": 9e6, "ahead_wasted_bytes": 3e6} if arm.name == "exact" else {}
        return fake_sample(1.0, [seconds] * 6, **missed)

    monkeypatch.setattr(bench, "_reads", reads)
    monkeypatch.setattr(bench, "run_arm", run)
    monkeypatch.setattr(bench, "disk_rate", lambda setup: 1e9)
    arms = (Arm("exact"), Arm("stock", "stock"))
    s = setup(model, *arms, repetitions=2, roofline=True, interference=True)
    ((ours, theirs),) = measure(s, lambda text: None)
    assert rates == [pytest.approx(1e7)] * 2  # 6 MB in 0.6 s
    assert ([len(one.interfered) for one in (ours, theirs)], started) == ([2, 0], [])
    assert ours.interfered[0]["decode"]["seconds"] == [0.2] * 6


def test_reads_go_on_beside_and_end(model: Path) -> None:
    before = children()
    with bench._reads(setup(model), 1e6):
        (reader,) = children() - before
        until = time.monotonic() + 20
        while reads_of(reader) < 1 << 20 and time.monotonic() < until:
            time.sleep(0.05)
        assert reads_of(reader) >= 1 << 20
    assert children() == before


def test_reads_beside_that_end_are_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_READER", "raise SystemExit('no such disk')")
    with (
        pytest.raises(HobbitError, match="the reads beside the run ended: no such disk"),
        bench._reads(setup(model), 1e6),
    ):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


def children() -> set[int]:
    task = Path(f"/proc/{os.getpid()}/task")
    return {int(n) for file in task.glob("*/children") for n in file.read_text().split()}


def reads_of(process: int) -> int:
    """Return bytes that a process has read, from a disk or a cache."""
    return int(Path(f"/proc/{process}/io").read_text().split()[1])


def test_what_does_not_fit_has_no_roofline(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    streamed = fake_sample(1.0, [0.5] * 6) | {"plan": "streamed"}
    monkeypatch.setattr(bench, "run_arm", lambda *_: streamed)
    monkeypatch.setattr(bench, "disk_rate", lambda setup: 1e9)
    found = measure(setup(model, repetitions=2, roofline=True), said.append)
    assert any(line.startswith("no roofline: ") for line in said)
    table = as_markdown(rows(found)).splitlines()
    assert table[-1].rstrip(" |").endswith("-")


def test_limits_page_cache_and_warm_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run gets: its cgroup's limits, files dropped or not, a pass to warm up."""
    seen: list[tuple[Any, ...]] = []
    dropped: list[Path] = []

    def record(group: cgroup.Group, code: str, path: str, job: str) -> CompletedProcess[str]:
        fields = json.loads(job)
        seen.append((len(dropped), fields["warm_up"], fields["arguments"]))
        dropped.clear()
        return CompletedProcess([], 0, json.dumps(fake_sample(1.0, [1.0])), "")

    def limits(*given: Any) -> cgroup.Group:
        seen.append(given[:2])
        return cgroup.Group()

    monkeypatch.setattr(bench, "_run", record)
    monkeypatch.setattr(bench, "limited", limits)
    monkeypatch.setattr(bench, "drop_from_page_cache", dropped.append)
    warm = setup(model, read_bps=5 << 20, low=(Path("low"),))
    cold = setup(model, warm=False)
    case, capped = Case(24, 30), Arm("fast", arguments={"quality": "fast"}, cap=1 << 30)
    run_arm(warm, case, capped, 0)
    run_arm(warm, case, Arm("stock", "stock"), 0)
    run_arm(warm, case, Arm("resident"), 0)
    run_arm(cold, case, Arm("exact"), 0)
    assert seen == [
        (1 << 30, 5 << 20), (2, 8, {"memory": 1 << 30, "quality": "fast"}),
        (0, 5 << 20), (0, 8, {}),
        (0, 0), (0, 30, {"memory": "auto"}),
        (0, 0), (1, -1, {"memory": "auto"}),
    ]  # fmt: skip


def test_an_arm_that_does_less_says_so(model: Path) -> None:
    s = setup(model, Arm("exact"), Arm("stock", "stock", less={"n_prompt": 0, "n_gen": 2}))
    found = rows(measure(s, lambda text: None))
    assert [(r["mode"], r["test"]) for r in found] == [
        ("exact", "pp24"),
        ("exact", "tg6"),
        ("stock", "tg2"),
    ]


def test_what_an_arm_says_is_raised_as_its_error() -> None:
    said = json.dumps({"error": "no such file", "kind": "ModelError"})
    arm = Arm("exact", cap=1 << 30)
    with pytest.raises(ModelError, match=r"^exact: no such file$"):
        bench._sample(arm, CompletedProcess([], 0, said, ""))
    with pytest.raises(PlanError, match=r"killed by its memory cap of 1\.0 GiB"):
        bench._sample(arm, CompletedProcess([], -9, "", ""))
    with pytest.raises(HobbitError, match="ended with 3: the last word"):
        bench._sample(arm, CompletedProcess([], 3, "", "one\nthe last word\n"))


def test_a_read_limit_that_does_not_hold(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_run", lambda *_: CompletedProcess([], 0, "9e9\n", ""))
    monkeypatch.setattr(bench, "limited", lambda *_: cgroup.Group())
    with pytest.raises(CapUnavailable, match="9000 MB/s in spite of the limit of 500 MB/s"):
        bench.disk_rate(setup(model, read_bps=500_000_000))
    assert bench.disk_rate(setup(model)) == 9e9


def test_the_disks_rate_is_read(model: Path) -> None:
    s = setup(model)
    assert s.piece_bytes == [matrix.expert_bytes for matrix in s.layout.groups[0].matrices]
    assert bench.disk_rate(s) > 1e6
    shrunk = model.with_name("shrunk.gguf")
    shrunk.write_bytes(model.read_bytes())
    s = setup(shrunk)
    shrunk.write_bytes(b"GGUF")
    with pytest.raises(HobbitError, match=r"rate is not known: .*too small to measure its disk"):
        bench.disk_rate(s)


# Rows


def test_roofline_by_hand(model: Path) -> None:
    assert bound_s(0.1, 50e6, 1e9) == pytest.approx(0.1)  # computing takes longer
    assert bound_s(0.1, 300e6, 1e9) == pytest.approx(0.3)
    # Two tokens in 0.8 s and 0.6 s; 400 MB for the two, of which 100 MB were read in vain.
    ours = [
        fake_sample(1.0, [d / 2] * 2, read_bytes=400e6, ahead_wasted_bytes=100e6, hits=3, misses=1)
        for d in (0.8, 0.6, 1.0)
    ]
    resident = [fake_sample(0.5, [0.1] * 2) for _ in ours]
    disk = [1e9, 1e9, 500e6]
    one = Measured(setup(model), Case(10, 2), Arm("exact"), ours, resident, disk_bytes_s=disk)
    prompt, decode = rows([[one]])
    # 0.4 / 0.15, 0.3 / 0.15 and 0.5 / 0.3.
    assert decode["roofline"] == pytest.approx(2.0)
    assert (decode["bound"], prompt["bound"]) == ("disk", "compute")
    assert prompt["roofline"] == pytest.approx(2.0)
    assert decode["resident_s_per_token"] == pytest.approx(0.1)
    assert decode["roofline_reading"] is None
    # Beside reads computing takes 0.2 s a token: 0.4 / 0.2, 0.3 / 0.2 and 0.5 / 0.3.
    slower = [fake_sample(0.5, [0.2] * 2) for _ in ours]
    told, read = rows([[replace(one, interfered=slower)]])
    assert (told["roofline_reading"], read["roofline_reading"]) == (None, pytest.approx(5 / 3))
    assert (read["roofline"], read["reading_s_per_token"]) == (pytest.approx(2.0), 0.2)
    assert "| roofline, reading |" in as_markdown([told, read])
    assert decode["hit_rate"] == 0.75
    assert decode["mib_per_token"] == pytest.approx(200e6 / (1 << 20))
    assert (prompt["ttft_s"], decode["ttft_s"]) == (1.0, None)
    rates = [2.5, 2 / 0.6, 2.0]
    assert decode["samples_ts"] == pytest.approx(rates)
    assert (decode["min_ts"], decode["median_ts"]) == (pytest.approx(2.0), pytest.approx(2.5))
    assert decode["avg_ts"] == pytest.approx(sum(rates) / 3)
    assert (decode["n_past"], decode["n_gen"], decode["n_prompt"]) == (10, 2, 0)


def test_a_breakdown_adds_up(model: Path) -> None:
    parts = {"moe_s": 0.2, "stall_s": 0.4, "manage_s": 0.1, "predict_s": 0.02}
    runs = [fake_sample(1.0, [s / 2] * 2, **parts) for s in (9.0, 1.0, 2.0)]
    (_, decode) = rows(
        [[Measured(setup(model), Case(10, 2), Arm("exact"), runs, disk_bytes_s=[1e9])]]
    )
    # Of the run whose time is the median, a token.
    assert decode["breakdown"] == pytest.approx(
        {"total_s": 1.0, "compute_s": 0.1, "stall_s": 0.2, "manage_s": 0.05, "predict_s": 0.01,
         "device_wait_s": 0.0, "rest_s": 0.64}
    )  # fmt: skip
    assert "| exact |  1000.00 |  100.00 | 200.00 | 50.00 |      10.00 | 640.00 |" in as_markdown(
        [decode], breakdown=True
    )


def test_rows_tell_of_cache_and_predictions(model: Path) -> None:
    counted = {"predicted": 8, "predicted_right": 6, "ahead_bytes": 4 << 20, "evictions": 10}
    wasted = {"ahead_wasted_bytes": 1 << 20}
    samples = [fake_sample(1.0, [0.5] * 2, **counted, **wasted) for _ in range(3)]
    for sample, predictor in zip(samples, ("gate", "none", "gate"), strict=True):
        sample |= {"plan": "streamed", "predictor": predictor}
    case, stock = Case(0, 2), Arm("stock", "stock")
    arm = Arm("exact", arguments={"policy": "lru"})
    ours = Measured(setup(model), case, arm, samples, disk_bytes_s=[1e9])
    theirs = [fake_sample(1.0, [0.5] * 2) | {"decode": DISK_ONLY, "prompt": DISK_ONLY}]
    first, last = rows([[ours, Measured(setup(model), case, stock, theirs, disk_bytes_s=[1e9])]])[
        -2:
    ]
    found = {
        "policy": "lru", "predict": "auto", "predictor": "gate", "accuracy": 0.75,
        "ahead_mib_per_token": 2.0, "wasted_mib_per_token": 0.5, "evictions_per_token": 5.0,
    }  # fmt: skip
    assert {name: first[name] for name in found} == found
    assert {last[name] for name in found} == {None}
    table, parts, cache = as_markdown([first, last], breakdown=True).split("\n\n")
    assert "| policy |" in table and "| predict |" not in table
    assert [line.split("|")[3].strip() for line in parts.splitlines()[2:]] == ["lru", "-"]
    (line,) = cache.splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["tg2", "exact", "lru", "gate", "75.0", "2.00", "0.50", "5.00"]
    cached = [sample | {"plan": "resident-experts"} for sample in samples]
    assert rows([[replace(ours, samples=cached)]])[-1]["predictor"] is None


DISK_ONLY = {"seconds": [1.0], "tokens": 2, "disk_bytes": 8 << 20}


def test_stock_is_told_by_what_its_disk_gave(model: Path) -> None:
    sample = fake_sample(1.0, [0.5] * 2)
    for phase in ("prompt", "decode"):
        sample[phase] = {"seconds": [1.0], "tokens": 2, "disk_bytes": 8 << 20}
    resident = [fake_sample(0.5, [0.1] * 2)]
    arm = Arm("stock-mmap", "stock-mmap", cap=1 << 30)
    one = Measured(setup(model), Case(2, 2), arm, [sample], resident, disk_bytes_s=[1e9])
    row = rows([[one]])[1]
    assert (row["mib_per_token"], row["hit_rate"], row["roofline"]) == (4.0, None, None)
    assert row["breakdown"] == {
        "total_s": 0.5, "compute_s": None, "stall_s": None, "manage_s": None, "predict_s": None,
        "device_wait_s": None, "rest_s": None,
    }  # fmt: skip
    assert "1.0 GiB" in as_markdown([row])


# The command


def test_formats(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchOptions(
        words=(str(model),), n_prompt="24,8", n_gen="6", threads="1", pg=("8,4",), repetitions=1,
        output="json", arm=("exact,stock",), quiet=True,
    )  # fmt: skip
    assert bench_command._bench(options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    expected = [(t, m) for t in ("pp24", "tg6", "pp8", "pp8+tg4") for m in ("exact", "stock")]
    assert [(row["test"], row["mode"]) for row in found] == expected
    for row in found:
        assert len(row["samples"]) == len(row["samples_ts"]) == len(row["samples_ns"]) == 1
        assert row["avg_ts"] > 0
        assert (row["roofline"] is None) == (row["mode"] == "stock")
        assert row["resident_s_per_token"] > 0
    lines = [json.loads(line) for line in FORMATS["jsonl"](found).splitlines()]
    assert lines == found
    table = list(csv.DictReader(io.StringIO(FORMATS["csv"](found))))
    assert [(row["test"], row["mode"]) for row in table] == expected
    assert float(table[0]["avg_ts"]) == pytest.approx(found[0]["avg_ts"])
    assert float(table[0]["token_total_s"]) == found[0]["breakdown"]["total_s"]
    assert "samples" not in table[0]
    head, rule, *body = as_markdown(found).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names == [
        "model", "size", "params", "backend", "threads", "test", "t/s", "median (range)", "mode",
        "mem", "hit %", "MiB/t", "ttft", "roofline",
    ]  # fmt: skip
    assert len(body) == len(expected)
    assert {len(line) for line in (head, rule, *body)} == {len(head)}
    assert set(rule) == set("|-: ")


def test_the_table_is_alone_on_stdout(model: Path) -> None:
    done = hobbit("bench", model, *QUICK, "-ub", "16", "--breakdown", "-d", "8")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.split("\n\n")
    assert "| n_ubatch |" in first and "pp24 @ d8" in first and "tg6 @ d8" in first
    assert second.startswith("| ") and "stall" in second.splitlines()[0]
    assert third.splitlines()[0].split() == [
        "|", "test", "|", "mode", "|", "predictor", "|", "right", "%", "|", "ahead", "MiB/t", "|",
        "wasted", "MiB/t", "|", "evictions/t", "|",
    ]  # fmt: skip
    assert "run 1/1 exact: prompt " in done.stderr
    assert "olmoe" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--arm", "quick"], 2, "--arm quick: an arm is exact, high, balanced, fast, stock-mmap"),
        (["--arm", "exact@x"], 2, "'x' is not a size"),
        (["--arm", "fast"], 3, "run hobbit prepare"),
        (["--interference"], 2, "--interference is a second roofline: without --no-roofline"),
        (["-o", "sql"], 2, "-o sql: must be one of md, csv, json, jsonl"),
        (["-p", "0", "-n", "0"], 2, "-p 0 -n 0 leaves nothing to measure"),
        (["-p", "many"], 2, "-p many: must be numbers"),
        (["-t", "0"], 2, "-t 0: must be numbers from 1"),
        (["-pg", "8"], 2, "-pg 8: must be a prompt and what is decoded"),
        (["-ctk", "q9"], 2, "-ctk q9: must be one of f32"),
        (["--policy", "mru"], 2, "there is no cache policy 'mru': use one of decay, hobbit"),
        (["--predictor", "gate:depth=9"], 2, "a predictor has no setting 'depth=9'"),
        (["--memory", "auto"], 2, "--memory auto: a benchmark's cap"),
        (["--memory", "x%model"], 2, "is not a share of the model"),
        (["--read-bps", "1"], 2, "must be 1M a second or more"),
        (["--text", "/nowhere"], 2, "cannot read /nowhere"),
        (["-p", "90000"], 2, "90006 are needed: name a longer text with --text"),
    ],
)
def test_bad_input_is_one_line(model: Path, arguments: list[str], code: int, said: str) -> None:
    done = hobbit("bench", model, *QUICK, *arguments, "-q")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("hobbit: error: ")]
    assert said in line
    assert "Traceback" not in done.stderr


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = hobbit("bench", tmp_path / "absent.gguf", *QUICK)
    assert done.returncode == 3
    assert "absent.gguf" in done.stderr and "Traceback" not in done.stderr


def root_groups() -> None:
    try:
        with cgroup.MemoryGroup(64 << 20):
            pass
    except CapUnavailable as exc:
        pytest.skip(str(exc))


def test_under_a_cap(model: Path) -> None:
    root_groups()
    done = hobbit(
        "bench", model, *QUICK, "--memory", "400M", "--arm", "exact,stock@none", "-o", "json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["mode"], r["mem_bytes"]) for r in found[:2]] == [("exact", 400 << 20), ("stock", 0)]
    peak = found[0]["samples"][0]["peak_bytes"]
    assert peak is None or 0 < peak <= 400 << 20


def test_a_cap_that_is_too_small(model: Path) -> None:
    root_groups()
    done = hobbit("bench", model, *QUICK, "--memory", "100M")
    assert (done.returncode, done.stdout) == (4, "")
    assert "exact: a memory cap of 100.0 MiB" in done.stderr
    assert "the smallest cap that works is --memory" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_nothing(model: Path, number: int) -> None:
    command = ["bench", model, "-p", "24", "-n", "6", "-t", "1", "-r", "500", "--no-roofline"]
    with started(*command) as process:
        assert process.stderr is not None
        wait_for(process.stderr, b"run 2/500")
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
        left = process.stderr.read().decode()
    assert "Traceback" not in left
    groups = [*cgroup.ROOT.rglob(f"hobbit-bench-{process.pid}")]
    assert groups == []
    for other in Path("/proc").glob("[0-9]*/stat"):
        try:
            assert other.read_text().rpartition(")")[2].split()[1] != str(process.pid)
        except OSError:
            continue


# Options


def test_every_flag_is_an_option() -> None:
    flags = set(inspect.signature(bench_command.bench).parameters)
    assert flags == {field.name for field in fields(BenchOptions)}


def test_cases_have_llama_benchs_rows() -> None:
    options = BenchOptions(n_prompt="8-32*2", n_gen="4,6", pg=("16,2",), n_depth="0-16+16")
    found = [(c.n_prompt, c.n_gen, c.n_depth, c.tests) for c in options.cases()]
    once = [
        (8, 4, ("pp", "tg")), (16, 0, ("pp",)), (32, 0, ("pp",)), (8, 6, ("tg",)),
        (16, 2, ("pg",)),
    ]  # fmt: skip
    assert found == [(p, n, d, t) for d in (0, 16) for p, n, t in once]
    assert [c.n_ubatch for c in BenchOptions(ubatch_size="64,128").cases()] == [64, 128]
    quantised = BenchOptions(cache_type_v="q8_0").cases()[0].context
    assert (quantised["type_v"], quantised["flash_attn"]) == (8, True)
    assert BenchOptions(n_prompt="0").cases()[0].n_prompt == 0


def test_each_policy_with_each_predictor_is_an_arm(model: Path) -> None:
    options = BenchOptions(
        arm=("exact,stock",),
        policy=("lru", "decay", "decay:half_life=48"),
        predictor=("auto", "gate:odds=0.7,always"),
    )
    arms = options.setup(build_layout(open_gguf(model))).arms
    assert [arm.title for arm in arms] == [
        "exact, lru", "exact, lru, gate:always", "exact", "exact, gate:always", "stock",
    ]  # fmt: skip
    assert [arm.arguments for arm in arms[1:3]] == [{"policy": "lru", "predict": "gate:always"}, {}]
    assert BenchOptions().engines() == [{}]


def test_no_arm_starts_warm() -> None:
    assert inspect.signature(Llama).parameters["warm_start"].default is False


def test_caps() -> None:
    assert cap_bytes("none", 1) == cap_bytes("0", 1) == 0
    assert cap_bytes("55%model", 1 << 30) == (1 << 30) * 55 // 100 // 4096 * 4096
    assert cap_bytes("1G", 7) == 1 << 30
    for wrong in ("auto", "0%model", "%model", "150%"):
        with pytest.raises(UsageError):
            cap_bytes(wrong, 1 << 30)


def test_models_are_named_in_every_way(model: Path) -> None:
    assert BenchOptions().names == (None,)
    odd = model.with_name("a,b.gguf")
    odd.touch()
    options = BenchOptions(words=(str(odd), "c,d"), model=("demo",))
    assert options.names == (str(odd), "c", "d", "demo")


def test_arms_of_options(model: Path) -> None:
    options = BenchOptions(arm=("exact, stock-mmap@none", "stock@1G", "exact"), memory="2G")
    arms = options.setup(build_layout(open_gguf(model))).arms
    assert [(a.name, a.engine, a.cap) for a in arms] == [
        ("exact", "hobbit", 2 << 30),
        ("stock-mmap", "stock-mmap", 0),
        ("stock", "stock", 1 << 30),
    ]
    assert os.fspath(options.text_file()) == str(path_of(SAMPLE))
    assert BenchOptions(text="random").text_file() == ""
