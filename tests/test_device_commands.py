"""Devices on the command line: what each command takes, and what it tells of one.

The device is the RPC server of test_devices.py, or the CPU where the memory is to be the machine's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from gates import layout_of
from prometheus_client.parser import text_string_to_metric_families
from servers import Server, running
from serving import loopback_only as loopback_only
from serving import served

import hobbit
from hobbit.arena import DeviceInfo, plan_arena, resolve_vram
from hobbit.bench_options import BenchOptions
from hobbit.chat.view import PANEL_ROWS, Live, line, panel
from hobbit.devices import names
from hobbit.doctor import engine
from hobbit.errors import PlanError, UsageError
from hobbit.memory import MemoryPlan
from hobbit.options import EvalOptions, Options, PlanOptions, device_arguments, model_arguments
from hobbit.planning import machine, tiers
from hobbit.planning.estimate import DeviceCosts, There, hit_rate
from hobbit.planning.planner import plan
from hobbit.stats import Stats

SMALL = ("-t", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("m") / "m.gguf", arch="qwen3moe")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose one client is free: the commands' own processes connect."""
    with running(connects=False) as started:
        yield started


def hobbit_(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# What is asked for


def test_what_names_a_device() -> None:
    assert device_arguments(None, "auto", None) == device_arguments("none", "auto", None) == {}
    there = {"device": "CUDA0", "vram": "4G", "rpc": None, "dispatch": "auto"}
    assert device_arguments("CUDA0", "4G", None) == there
    for given, said in (
        ((None, "4G", None), "--vram 4G: name the device"),
        ((None, "auto", None, "cpu"), "--dispatch cpu: name the device"),
        (("CUDA0", "auto", None, "gpu"), "--dispatch gpu: must be one of auto, device, cpu, split"),
        (("none", "4G", None), "--vram 4G: name the device"),
        (("none", "auto", "h:1"), "--device none and --rpc"),
        (("CUDA0,CUDA1", "auto", None), "experts go to one device"),
        (("CUDA0", "much", None), "'much' is not a size"),
    ):
        with pytest.raises(UsageError, match=said):
            device_arguments(*given)


@pytest.mark.parametrize("options", [Options, EvalOptions])
def test_every_command_hands_it_on(options: Any) -> None:
    asked = options(device="CUDA0", vram="4G", dispatch="split")
    loading = asked if options is Options else asked.loading()
    found = model_arguments(loading, 512)
    assert (found["device"], found["vram"], found["rpc"]) == ("CUDA0", "4G", None)
    assert found["dispatch"] == "split"
    with pytest.raises(UsageError, match="name the device"):
        options(vram="4G")


def test_the_gpus_of_llama_cpp(model: Path) -> None:
    options = Options(main_gpu=3, split_mode="row", gpu_layers="7", device="none")
    arguments = model_arguments(options, 512)
    assert (arguments["main_gpu"], arguments["split_mode"]) == (3, 2)
    assert "device" not in arguments
    with hobbit.Llama(str(model), main_gpu=3, split_mode=2, n_gpu_layers=7) as llm:
        params = llm.model_params
        assert (params.main_gpu, params.split_mode, params.n_gpu_layers) == (3, 2, 7)
    with pytest.raises(UsageError, match="--split-mode half: must be one of none, layer, row"):
        Options(split_mode="half")


@pytest.mark.parametrize("command", ["run", "serve"])
@pytest.mark.parametrize("flag", ["-cmoe", "-ncmoe 3", "-ot exps=CPU"])
def test_llama_cpps_own_placing_is_refused(command: str, flag: str) -> None:
    done = hobbit_(command, "m.gguf", *flag.split())
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert flag.split()[0] in said and "--memory" in said and "--vram" in said


# bench


def test_an_arm_for_each_amount() -> None:
    options = BenchOptions(device="GPU0", vram="0,1G,2G", policy=("lru",))
    assert options.engines() == [
        {"policy": "lru"},
        {"policy": "lru", "device": "GPU0", "vram": "1G"},
        {"policy": "lru", "device": "GPU0", "vram": "2G"},
    ]
    assert BenchOptions(rpc="h:1").engines() == [{"vram": "auto", "rpc": "h:1"}]
    assert BenchOptions(device="GPU0", vram="0,1G", dispatch=("auto", "cpu")).engines() == [
        {},
        {"device": "GPU0", "vram": "1G"},
        {"device": "GPU0", "vram": "1G", "dispatch": "cpu"},
    ]
    with pytest.raises(UsageError, match="name the device"):
        BenchOptions(vram="1G,2G")
    with pytest.raises(UsageError, match="say how much"):
        BenchOptions(device="GPU0", vram=",")


def test_bench(model: Path, server: Server) -> None:
    amounts = ("-p", "24", "-n", "6", "-r", "1", "--no-roofline", "--text", "random", *SMALL)
    there = ("--rpc", server.endpoint, "--vram", "0,16M", "--dispatch", "split")
    done = hobbit_("bench", model, *amounts, *there, "-o", "json")
    assert done.returncode == 0, done.stderr
    without, with_ = (r for r in json.loads(done.stdout) if r["test"] == "tg6")
    assert {without[name] for name in without if name.startswith("hobbit_device")} == {None}
    assert with_["hobbit_device"] == "RPC0"
    assert 0 < with_["hobbit_device_vram_bytes"] <= 16 << 20
    assert with_["hobbit_device_hit_rate"] > 0.5
    assert with_["hobbit_device_mib_per_token"] >= 0
    assert with_["hobbit_device_s_per_token"] > 0
    assert with_["hobbit_device_wait_s_per_token"] == pytest.approx(
        with_["breakdown"]["device_wait_s"]
    )
    assert f"exact, {server.endpoint} 16M split: prompt" in done.stderr
    done = hobbit_("bench", model, *amounts, *there, "-v")
    first, parts, _, devices = done.stdout.split("\n\n")
    cells = [cell.strip() for cell in first.splitlines()[0].strip("|").split("|")]
    assert {"device", "vram", "dispatch", "device %"} <= {*cells}
    assert "for the device" in parts.splitlines()[0]
    assert len(devices.splitlines()) == 2 + 2  # the rows of the arm that has one


# verify and eval


def test_verify(model: Path, server: Server) -> None:
    done = hobbit_(
        "verify",
        model,
        *SMALL,
        "--rpc",
        server.endpoint,
        "--vram",
        "16M",
        "--dispatch",
        "split",
        "-q",
    )
    assert done.returncode == 0, done.stderr
    assert all("identical logits" in row for row in done.stdout.splitlines())
    assert "hits on the device" in done.stdout


def test_eval(model: Path, server: Server) -> None:
    amounts = ("--tokens", "200", "--window", "40", "--mode", "exact", *SMALL, "--json", "-q")
    done = hobbit_("eval", model, *amounts, "--rpc", server.endpoint, "--vram", "16M")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device"]["name"] == "RPC0"
    assert found["device"]["description"] == server.endpoint


# serve


def test_serve(model: Path, server: Server) -> None:
    with served(model, "--rpc", server.endpoint, "--vram", "16M", "--dispatch", "split") as web:
        for _ in range(2):
            answer = web.ask("/completion", {"prompt": "one two", "n_predict": 16})
            assert answer.status == 200
        text = web.ask("/metrics").body.decode()
        samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
        lookups = {
            s.labels["tier"]: s.value for s in samples if s.name == "hobbit_expert_lookups_total"
        }
        others = {s.name: s.value for s in samples if s.name.startswith("hobbit_device")}
        stats, planned = web.ask("/hobbit/stats").json, web.ask("/hobbit/plan").json
        counted = stats["stats"]
        assert lookups == {
            "device": counted["device_hits"],
            "ram": counted["hits"] - counted["device_hits"],
            "disk": counted["misses"],
        }
        assert counted["device_hits"] > 0 and 0 < counted["device_share"] < 1
        assert others["hobbit_device_bytes_total"] == counted["device_bytes"] > 0
        assert others["hobbit_device_memory_bytes"] == stats["device"]["bytes"]
        assert others["hobbit_device_seconds_total"] > 0
        assert planned["arena"]["name"] == stats["device"]["name"] == "RPC0"
        assert planned["device"]["bytes"] == planned["arena"]["bytes"]
        web.until(lambda: any("| device " in said for said in web.lines), "the request's line")


def test_a_server_that_comes_back_is_used_again(model: Path) -> None:
    """The model had layers there: each request tells so, or loads it anew."""
    with running(connects=False) as there:
        asked = "--rpc", there.endpoint, "--vram", "16M", "-ngl", "99", "--dispatch", "device"
        with served(model, *asked) as web:

            def ask() -> tuple[int, str]:
                request = {"prompt": "one two", "n_predict": 8, "temperature": 0}
                answer = web.ask("/completion", request)
                said = answer.json
                return answer.status, said["error"]["message"] if "error" in said else said[
                    "content"
                ]

            first = ask()
            assert first[0] == 200
            for _ in range(2):
                there.kill()
                assert "was lost: " in ask()[1]
                assert f"no RPC server answers at {there.endpoint}" in ask()[1]
                there.start_again()
                assert ask() == first
            assert web.ask("/hobbit/stats").json["stats"]["device_pairs"] > 0


# The chat's panel


def test_the_panel_shows_the_device(model: Path) -> None:
    with hobbit.Llama(str(model), device="CPU", vram="16M", n_threads=1, memory="3G") as llm:
        live = Live(llm)
        stats = Stats(hits=80, misses=20, device_hits=40, mode="streamed")
        assert "hit 80 % | device 40 %" in line(live, stats, 200)
        rows = panel(live, stats, 100)
        assert len(rows) == PANEL_ROWS
        assert any(row.endswith("20 missed, 40 % on the device") for row in rows)
    with hobbit.Llama(str(model), n_threads=1, memory="3G") as llm:
        live, stats = Live(llm), replace(stats, device_hits=0)
        assert "device" not in line(live, stats, 200)
        assert any(row.endswith("20 missed") for row in panel(live, stats, 100))


# doctor


def test_doctor_names_the_devices() -> None:
    assert "CPU" in names()
    own = DeviceInfo("GPU0", "a card", False, 6 << 30, 8 << 30)
    found = engine._device(own)
    assert (found.name, found.state) == ("device GPU0", "ok")
    assert "a card, 6.0 GiB of 8.0 GiB free, memory of its own" in found.found
    shared = engine._device(replace(own, shares_memory=True))
    assert "part of --memory; holds experts with --device GPU0 --vram SIZE" in shared.found
    assert shared.facts["shares_memory"]


# plan


@pytest.fixture
def given_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Speeds as given, and nothing remembered of devices."""
    monkeypatch.setattr(machine, "_measured", lambda kind, n: {"decode": 1e10, "prompt": 1e11})
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))


class Enough(Exception):
    """The plan is there: nothing needs to be loaded."""


def loaded_plan(path: Path, **arguments: Any) -> MemoryPlan:
    plans: list[MemoryPlan] = []

    def stop(plan: MemoryPlan) -> None:
        plans.append(plan)
        raise Enough

    with pytest.raises(Enough):
        hobbit.Llama(str(path), n_ctx=512, n_batch=2048, n_threads=1, on_plan=stop, **arguments)
    return plans[0]


def test_unified_memory_is_counted_once(model: Path, given_speeds: None) -> None:
    """The arena is a line of the cap, in the plan and in the model that is loaded, and no other."""
    asked: dict[str, Any] = {"device": "CPU", "vram": "1M", "memory": "3G"}
    made = plan(model, n_ctx=512, n_threads=1, read_gbps=1.0, **asked).memory
    bare = plan(model, n_ctx=512, n_threads=1, read_gbps=1.0, memory="3G").memory
    real = loaded_plan(model, **asked)
    assert made is not None and bare is not None
    for found in (made, real):
        assert found.device is None
        assert sum(line.bytes for line in found.lines) + found.spare_bytes == 3 << 30
        assert [line.name for line in found.lines].count("device") == 1
    of = {name: {line.name: line.bytes for line in p.lines} for name, p in
          (("made", made), ("bare", bare), ("real", real))}  # fmt: skip
    assert of["made"]["device"] == of["real"]["device"] <= 1 << 20
    assert "device" not in of["bare"]
    arena = plan_arena(layout_of(model), DeviceInfo("CPU", "", True, 0, 0), 1 << 20, 1 << 30, 0)
    staging = arena.staging(layout_of(model))
    assert of["made"]["scratch"] - of["bare"]["scratch"] == staging
    with pytest.raises(UsageError, match="shares the machine's memory"):
        plan(model, device="CPU", read_gbps=1.0, n_threads=1)


def test_a_device_with_memory_of_its_own_is_not_part_of_the_cap(
    model: Path, given_speeds: None, server: Server
) -> None:
    asked: dict[str, Any] = {"rpc": server.endpoint, "vram": "1M", "memory": "400M"}
    done = hobbit_("plan", model, *SMALL, "-c", "512", "--rpc", server.endpoint, "--vram", "1M",
                   "--memory", "400M", "--read-gbps", "1", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import test_device_commands as t;"
        "from pathlib import Path;"
        "print(json.dumps(t.loaded_plan(Path(sys.argv[2]), **json.loads(sys.argv[3])).to_dict()))"
    )
    here = str(Path(__file__).parent)
    told = subprocess.run(
        [sys.executable, "-c", code, here, str(model), json.dumps(asked)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    real = json.loads(told.stdout)
    assert made["memory"]["device"] == real["device"]
    assert "device" not in {row["name"] for row in made["memory"]["lines"]}
    assert made["device"]["name"] == "RPC0"
    assert made["device"]["costs"]["source"] == "assumed"
    low, mid, high = made["estimate"]["device_hit"].values()
    assert 0 < low < mid < high <= 1


def test_a_card_that_is_not_here(tmp_path: Path, given_speeds: None) -> None:
    """More of its memory is faster, until it holds everything; a slow one is no help."""
    big = tiny.make(tmp_path / "big.gguf", "qwen3moe", n_embd=256, n_ff=1024, n_layer=4, n_expert=8)
    all_ = layout_of(big).expert_bytes
    fixed: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "read_gbps": 0.5}
    least = plan(big, "1M", **fixed).needed_bytes
    cap = least + all_ // 4
    speeds = []
    for share in (0.0, 0.5, 1.0):
        vram = f"{int(all_ * share) + (32 << 20)}" if share else "0"
        made = plan(big, cap + (70 << 20), vram=vram, device_gbps=100.0, **fixed)
        assert made.estimate is not None
        speeds.append(made.estimate.tok_s.mid)
        assert (made.memory is not None and made.memory.device is not None) == (share > 0)
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    slow = plan(big, "4G", vram="1G", device_gbps=0.01, **fixed)
    without = plan(big, "4G", **fixed)
    assert slow.limit == "device"
    assert slow.tok_s[1] < without.tok_s[0]
    with pytest.raises(PlanError, match=r"the smallest that works is --vram \d+M"):
        plan(big, "4G", vram="1000", **fixed)
    layers = {"n_gpu_layers": 0}
    assert PlanOptions(vram="6G").there == {"vram": "6G", "device_gbps": None, **layers}


def test_hits_on_a_device() -> None:
    there = There(0.25, DeviceCosts(1e11, 0.0, "given"))
    low, mid, high = there.hits(0.5, 2.0)
    assert low == pytest.approx(hit_rate(0.5, 2.0) / 2)
    assert high == pytest.approx(hit_rate(0.25, 2.0))
    assert mid == pytest.approx((low + high) / 2)
    assert There(1.0, there.costs).hits(1.0, 2.0) == (1.0, 1.0, 1.0)
    assert There(0.0, there.costs).hits(0.0, 2.0) == (0.0, 0.0, 0.0)


def test_what_is_learnt_of_a_device(given_speeds: None) -> None:
    card = DeviceInfo("GPU0", "a card", False, 8 << 30, 8 << 30)
    assert tiers.costs_of(card, 1e10).source == "assumed"
    assert tiers.costs_of(card, 1e10).bytes_s == tiers.ASSUMED_BYTES_S
    # What reads the machine's memory is no faster than its processor.
    assert tiers.costs_of(replace(card, shares_memory=True), 1e10).bytes_s == 1e10
    assert tiers.costs_of(card, 1e10, 50.0) == DeviceCosts(50e9, tiers.ASSUMED_BATCH_S, "given")
    assert not tiers.learn(card, 1e6, tiers.MIN_PAIRS - 1, 1.0)
    assert tiers.learn(card, 1e6, 1000, 0.01)
    assert tiers.costs_of(card, 1e10) == DeviceCosts(1e11, 0.0, "measured")
    assert tiers.costs_of(replace(card, name="GPU1"), 1e10).source == "assumed"


def test_auto_is_most_of_what_is_free() -> None:
    card = DeviceInfo("GPU0", "a card", False, 8 << 30, 8 << 30)
    assert resolve_vram("auto", card) < card.free_bytes


def test_a_run_teaches_the_plan(
    model: Path, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    there = ("--rpc", server.endpoint, "--vram", "16M")
    split = ("--dispatch", "split")
    done = hobbit_("run", model, "-p", "one", "-n", "150", *SMALL, *there, *split, "-q")
    assert done.returncode == 0, done.stderr
    planned = hobbit_("plan", model, *SMALL, *there, "--read-gbps", "1", "--json")
    costs = json.loads(planned.stdout)["device"]["costs"]
    assert costs["source"] == "measured"
    assert 0 < costs["bytes_s"] < 1e12
    why = hobbit_("why").stdout
    assert "waited for RPC0, which computed" in why
