"""Experts on a device: the logits are stock's, bit for bit, wherever each expert is computed.

The device is ggml's RPC server in another process, whose backend is the CPU: its memory is not
ours, and it computes as the CPU does.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from gates import JOB, Bench, assert_same, layout_of, opened, run, settled
from mixed import MIXED, mixed, pair
from servers import Server, in_a_process, running

import hobbit
from hobbit.arena import DISPATCHES, Arena, DeviceInfo, plan_arena
from hobbit.devices import Device, connect
from hobbit.errors import DeviceError, PlanError, UsageError
from hobbit.rule import Rule

SHARES = (0.25, 0.5, 1.0)
MUCH = "1G"  # a token: what is used is there soon
SEVERAL = replace(JOB, n_seq=3, n_prompt=40, n_decode=16)
BATCH = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def info(**changes: Any) -> DeviceInfo:
    plain = DeviceInfo("GPU0", "a device", False, 8 << 30, 8 << 30)
    return replace(plain, **changes)


def planned(path: Path, vram: int) -> Arena:
    return plan_arena(layout_of(path), info(), vram, BATCH, 0)


def slots_of(arena: Arena) -> int:
    return sum(pool.slots for pool in arena.pools)


def vram_for(path: Path, share: float) -> int:
    """Return how much memory it takes to have a share of all experts on the device."""
    experts = sum(group.n_expert for group in layout_of(path).groups)
    size, most = 256 << 10, 64 << 20
    while size < most:
        middle = (size + most) // 2
        with contextlib.suppress(PlanError):
            if slots_of(planned(path, middle)) >= share * experts:
                most = middle
                continue
        size = middle + 1
    return size


def there(server: Server, path: Path, share: float = 0.5, **more: Any) -> dict[str, Any]:
    """Return the arguments with which a share of the experts goes to the server."""
    there = {"device": server.device, "vram": vram_for(path, share), "upload": MUCH}
    return {**there, "dispatch": "split", **more}


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_architecture(arch: str, bench: Bench, server: Server) -> None:
    """Half of the experts may be there; biases, scales and fused matrices are of these models."""
    path = bench.arch(arch)
    with opened(path, "floor", **there(server, path)) as llm:
        assert_same(bench.stock(path), run(llm), arch)
        stats = llm.stats
        assert stats.device_hits > 10
        assert stats.device_bytes > 0
        assert stats.misses > 0, "nothing was computed here: the gate would be half of one"
        assert stats.device_pairs >= stats.device_hits
        assert stats.hits >= stats.device_hits
        assert stats.device_s > 0


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("cache", ["floor", "all"])
def test_split(share: float, cache: str, bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    experts = sum(group.n_expert for group in layout_of(path).groups)
    with opened(path, cache, **there(server, path, share)) as llm:
        expected = bench.stock(path)
        assert_same(expected, run(llm), f"{share:.0%}, cold")
        assert_same(expected, run(llm), f"{share:.0%}, warm")
        settled(llm)
        before = llm.stats
        assert_same(expected, run(llm), f"{share:.0%}, settled")
        since = llm.stats.minus(before)
        assert since.device_hits > 0
        assert llm.plan.device is not None
        words = f"RPC{server.device[3:]} ({server.endpoint}): "
        assert words in llm.plan.device.reason
        if share == 1.0:
            assert f"{experts} of {experts} experts (100 %)" in llm.plan.device.reason
            assert since.device_hits == since.hits, "all was there, and something was not used"
            assert since.read_bytes == since.device_bytes == 0


def test_nothing_goes_there_unasked(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", **there(server, path, upload=0)) as llm:
        assert_same(bench.stock(path), run(llm), "0 %")
        assert llm.stats.device_hits == llm.stats.device_bytes == 0
    with opened(path, "floor") as llm:
        assert_same(bench.stock(path), run(llm), "without a device")
        assert llm.plan.device is None
        assert llm.stats.device_hits == 0


def test_bytes_a_token(bench: Bench, server: Server) -> None:
    """One expert every other token, though each token uses several that are not there."""
    path = bench.arch("qwen3moe")
    expert = layout_of(path).groups[0].expert_bytes
    tokens = JOB.n_prompt + JOB.n_decode
    with opened(path, "all", **there(server, path, upload=expert // 2)) as llm:
        assert_same(bench.stock(path), run(llm), "slowly")
        assert 0 < settled(llm).device_bytes <= (tokens // 2 + 1) * expert


def test_small_batches(bench: Bench, server: Server) -> None:
    """The memory for activations holds few pairs: several batches, and some experts stay here."""
    path = bench.arch("gpt-oss")
    least = planned(path, 64 << 20)
    vram = least.bytes - least.batch_bytes + (256 << 10)
    arguments = there(server, path) | {"vram": vram}
    with opened(path, "floor", **arguments) as llm:
        assert_same(bench.stock(path), run(llm), "small batches")
        assert llm.stats.device_hits > 0


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "BF16"])
def test_expert_type(kind: str, bench: Bench, server: Server) -> None:
    path = bench.arch("llama", expert_type=kind, n_embd=256, n_ff=256, n_layer=2, n_expert=4)
    with opened(path, "floor", **there(server, path)) as llm:
        assert_same(bench.stock(path), run(llm), kind)
        assert llm.stats.device_hits > 0


def test_several_sequences(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", SEVERAL, **there(server, path)) as llm:
        assert_same(bench.stock(path, SEVERAL), run(llm, SEVERAL), "three sequences")
        assert llm.stats.device_hits > 0


def test_high_copy_on_a_device_is_used(bench: Bench, server: Server) -> None:
    """What needs low gets the high copy that is there; HOBBIT's rule asks for what is at hand."""
    paths = pair(bench, "qwen3moe")
    with mixed(paths, "floor", rule=Rule(0.3, 1.0), **there(server, paths[0], 1.0)) as llm:
        for _ in range(3):
            run(llm, MIXED)
        before = settled(llm)
        run(llm, MIXED)
        since = llm.stats.minus(before)
        assert since.device_pairs > 0
        assert since.pairs_high > since.pairs_low


def test_predictions_do_not_read_what_is_there(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    arguments = there(server, path, 1.0, predict="gate:always")
    with opened(path, "half", **arguments) as llm:
        run(llm)
        run(llm)
        before = settled(llm)
        assert_same(bench.stock(path), run(llm), "predicted")
        since = llm.stats.minus(before)
        assert since.predicted > 0
        assert since.read_bytes == since.ahead == 0


def test_another_cap_and_forgetting(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", **there(server, path)) as llm:
        expected = bench.stock(path)
        run(llm)
        llm.set_memory(llm.plan.cap.bytes)
        assert_same(expected, run(llm), "another cache")
        hits = llm.stats.device_hits
        llm.forget()
        assert_same(expected, run(llm), "forgotten")
        assert llm.stats.device_hits > hits


def test_importance_is_collected_here(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "all") as llm, llm.collect() as expected:
        run(llm)
    with opened(path, "all", **there(server, path, 1.0)) as llm:
        run(llm)
        hits = llm.stats.device_hits
        with llm.collect() as found:
            run(llm)
        assert llm.stats.device_hits == hits
    assert all((expected[name].rows == found[name].rows).all() for name in expected)


def test_the_machines_own_memory_counts(bench: Bench) -> None:
    """The CPU as a device: as with an integrated GPU, the arena is part of the cap."""
    path = bench.arch("qwen3moe")
    vram = vram_for(path, 0.5)
    with opened(path, "floor", device="CPU", vram=vram, upload=MUCH, dispatch="split") as llm:
        assert_same(bench.stock(path), run(llm), "CPU")
        assert llm.stats.device_hits > 0
        assert llm.plan.device is None
        line = next(line for line in llm.plan.lines if line.name == "device")
        assert 0 < line.bytes <= vram
        assert "in its own memory" not in line.reason
    with pytest.raises(UsageError, match=r"device CPU shares the machine's memory"):
        hobbit.Llama(str(path), device="CPU")


def test_the_plan_shows_the_device(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", **there(server, path)) as llm:
        plan = llm.plan
        assert any(line.startswith("device ") for line in plan.describe().splitlines())
        assert "not part of the cap" in plan.describe()
        assert plan.device is not None
        assert plan.to_dict()["device"]["bytes"] == plan.device.bytes <= vram_for(path, 0.5)
        assert sum(line.bytes for line in plan.lines) + plan.spare_bytes == plan.cap.bytes
        with pytest.raises(UsageError, match="with device"):
            hobbit.Llama(str(path), vram="1G")


def test_arena(bench: Bench) -> None:
    path = bench.arch("qwen3moe")
    experts = sum(group.n_expert for group in layout_of(path).groups)
    everything = planned(path, 1 << 30)
    assert slots_of(everything) == experts
    assert everything.bytes < 1 << 30
    for share in SHARES:
        found = planned(path, vram_for(path, share))
        assert found.bytes <= vram_for(path, share)
        assert slots_of(found) >= share * experts
    with pytest.raises(PlanError, match=r"the smallest that works is --vram \d+M") as refused:
        planned(path, 1000)
    assert slots_of(planned(path, refused.value.needed_bytes)) >= 1
    mixed_types = bench.arch(
        "qwen3moe", expert_type=lambda name: "Q8_0" if ".1." in name else "Q4_0"
    )
    assert [len(pool.groups) for pool in planned(mixed_types, 1 << 30).pools] != [4]


@pytest.mark.parametrize("vram", ["auto", "2G", 1 << 30])
def test_vram(vram: str | int) -> None:
    from hobbit.arena import resolve_vram

    sizes = {"auto": int((8 << 30) * 0.9), "2G": 2 << 30}
    assert resolve_vram(vram, info()) == sizes.get(str(vram), vram)
    with pytest.raises(PlanError, match=r"vram 9\.0 GiB: device GPU0 has 8\.0 GiB"):
        resolve_vram("9G", info())
    with pytest.raises(UsageError, match="leaves nothing"):
        resolve_vram(0, info())
    with pytest.raises(UsageError, match="does not tell"):
        resolve_vram("auto", info(free_bytes=0))


def test_no_device_of_that_name(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with pytest.raises(UsageError, match=rf"no device GPU7: there is .*CPU.*{server.device}"):
        hobbit.Llama(str(path), device="GPU7", vram="1G")
    with pytest.raises(UsageError, match="no device Hobbit"):
        Device("Hobbit")


def test_a_model_without_experts(bench: Bench) -> None:
    dense = bench.arch("llama", n_expert=0, n_used=0)
    with pytest.raises(UsageError, match="no experts that a device could hold"):
        hobbit.Llama(str(dense), device="CPU", vram="1G")


@pytest.mark.parametrize("endpoint", ["nowhere", "127.0.0.1:", "127.0.0.1:0", ":5", "h:70000"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(DeviceError, match="does not name a server"):
        connect(endpoint)


def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(DeviceError, match=f"no RPC server answers at {endpoint}"):
            connect(endpoint)


def test_who_is_no_rpc_server() -> None:
    """It hangs up, which ggml would end the process over. And then ggml can connect no more."""
    code = """
import sys
from hobbit.devices import connect
from hobbit.errors import DeviceError
for _ in range(2):
    try:
        connect(sys.argv[1])
    except DeviceError as error:
        print(error)
"""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    other.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        done = in_a_process(code, f"127.0.0.1:{other.getsockname()[1]}")
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert "is no RPC server of this llama.cpp's version" in first
    assert "start again" in second


def test_a_server_that_dies(bench: Bench) -> None:
    """One error of the evaluation that needed it; then the CPU goes on alone, and exactly."""
    code = """
import sys
import hobbit
from hobbit.errors import DeviceError
from servers import running

tokens = [*range(1, 21)]
with running() as server:
    arguments = dict(device=server.device, vram="8M", upload="1G", dispatch="split",
                 cache_bytes="floor")
    llm = hobbit.Llama(sys.argv[1], n_threads=1, n_ctx=64, logits_all=True, **arguments)

    def evaluate():
        llm.reset()
        llm.eval(tokens)
        return llm.scores[:20].copy()

    first = evaluate()
    assert (evaluate() == first).all() and llm.stats.device_hits > 0
    server.kill()
    try:
        evaluate()
    except DeviceError as error:
        print(error)
    hits = llm.stats.device_hits
    assert (evaluate() == first).all() and llm.stats.device_hits == hits
    llm.close()
print("goes on")
"""
    done = in_a_process(code, bench.arch("qwen3moe"))
    assert (done.returncode, done.stderr) == (0, "")
    lost, last = done.stdout.splitlines()
    assert lost.startswith("device RPC0 (127.0.0.1:")
    assert "was lost: Remote RPC server crashed" in lost
    assert last == "goes on"


def test_a_server_that_dies_before_the_end(bench: Bench) -> None:
    """Nobody needs it any more: the model closes, and so does the process."""
    code = """
import sys
import hobbit
from servers import running
with running() as server:
    llm = hobbit.Llama(sys.argv[1], device=server.device, vram="8M", n_threads=1, n_ctx=64)
    llm.eval([1, 2, 3])
    server.kill()
    llm.close()
print("closed")
"""
    done = in_a_process(code, bench.arch("qwen3moe"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@pytest.mark.parametrize(("dispatch", "share"), [("split", 1.0), ("device", 0.2)])
def test_a_server_that_hangs(dispatch: str, share: float, bench: Bench) -> None:
    """It is waited for until the evaluation is cancelled: then that ends soon, and it is lost.

    Be it in a batch, or in a copy of what is to be computed.
    """
    code = """
import os, signal, sys, threading, time
import hobbit
from hobbit.errors import DeviceError
from servers import running

with running() as server:
    arguments = dict(device=server.device, vram=int(sys.argv[3]), upload="1G", dispatch=sys.argv[2],
                     cache_bytes="floor")
    llm = hobbit.Llama(sys.argv[1], n_threads=1, n_ctx=64, **arguments)
    for _ in range(2):
        llm.reset()
        llm.eval([*range(1, 21)])
    os.kill(server.process.pid, signal.SIGSTOP)
    threading.Timer(0.2, llm.cancel).start()
    llm.reset()
    start = time.monotonic()
    try:
        llm.eval([*range(1, 21)])
    except DeviceError as error:
        print(error)
    assert time.monotonic() - start < 15
    os.kill(server.process.pid, signal.SIGCONT)
    llm.reset()
    llm.eval([*range(1, 21)])
    llm.close()
print("goes on")
"""
    path = bench.arch("qwen3moe")
    done = in_a_process(code, path, dispatch, vram_for(path, share))
    assert (done.returncode, done.stderr) == (0, "")
    lost, last = done.stdout.splitlines()
    assert lost.endswith("was lost: it does not answer")
    assert last == "goes on"


# --- who computes what ---


@pytest.mark.parametrize("cache", ["floor", "all"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dispatch(dispatch: str, cache: str, bench: Bench, server: Server) -> None:
    """Whoever computes an expert, and whatever is copied meanwhile: the logits are stock's."""
    path = bench.arch("qwen3moe")
    with opened(path, cache, **there(server, path, 0.25, dispatch=dispatch)) as llm:
        for when in ("cold", "warm"):
            assert_same(bench.stock(path), run(llm, JOB), f"{dispatch}, {when}")
        stats = settled(llm)
    assert (stats.device_pairs > 0) or dispatch in ("cpu", "auto")
    assert (stats.device_pairs == 0) or dispatch != "cpu"
    assert (stats.device_brought > 0) or dispatch != "device"
    assert (stats.device_brought == 0) or dispatch in ("device", "auto")
    if dispatch == "device":  # but for what is too much for a batch, or finds no slot
        assert stats.device_pairs > 0.5 * stats.pairs_high


def test_dispatch_changes(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", **there(server, path)) as llm:
        for dispatch in (*DISPATCHES, *reversed(DISPATCHES)):
            llm.set_dispatch(dispatch)
            assert_same(bench.stock(path), run(llm, JOB), dispatch)
        with pytest.raises(UsageError, match="dispatch both: use auto, device"):
            llm.set_dispatch("both")
    with opened(path, "floor") as llm, pytest.raises(UsageError, match="has no device"):
        llm.set_dispatch("cpu")


def test_a_slow_device_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splitting takes as long as the slower side, and no longer; auto does without it."""
    monkeypatch.setenv("HOBBIT_DEVICE_DELAYS", "20000,0,0")
    path, took = bench.arch("qwen3moe"), {}
    arguments = {"device": "CPU", "vram": vram_for(path, 0.5), "upload": MUCH}
    with opened(path, "all", dispatch="split", **arguments) as llm:
        run(llm, JOB)
        for dispatch in ("split", "auto"):
            llm.set_dispatch(dispatch)
            assert llm.dispatch == dispatch
            start = time.perf_counter()
            before = llm.stats
            assert_same(bench.stock(path), run(llm, JOB), dispatch)
            took[dispatch] = time.perf_counter() - start
            if dispatch == "split":
                whole = llm.stats.split_s - before.split_s
                assert 0 < whole < 1.15 * (llm.stats.split_longer_s - before.split_longer_s)
    assert took["auto"] < 0.5 * took["split"]


@pytest.mark.parametrize("text", ["20", "1,2,3,4", "1,2,3,turn", "a,b,c"])
def test_bad_delays(text: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_DEVICE_DELAYS", text)
    path = bench.arch("qwen3moe")
    with pytest.raises(UsageError, match="give three numbers, like 500,20,100"):
        opened(path, "all", device="CPU", vram=vram_for(path, 0.5)).__enter__()


@pytest.mark.parametrize("turns", ["", ",turns"])
def test_logits_do_not_depend_on_overlap(
    turns: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert is copied for its computation, in 2 ms at least, by turns or meanwhile.

    That they overlap is shown in tests/native/test_device.c.
    """
    path = bench.arch("qwen3moe")
    per_mib = round(2000 * (1 << 20) / layout_of(path).groups[0].expert_bytes)
    monkeypatch.setenv("HOBBIT_DEVICE_DELAYS", f"2000,0,{per_mib}{turns}")
    few = {"device": "CPU", "vram": vram_for(path, 0.2), "upload": "0"}
    with opened(path, "all", dispatch="device", **few) as llm:
        assert_same(bench.stock(path), run(llm, JOB))
        assert llm.stats.device_brought > 20


def test_where_a_copy_never_pays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other case is in tests/native/test_device.c, where the costs are given."""
    monkeypatch.setenv("HOBBIT_DEVICE_DELAYS", "0,10000,0")
    path = bench.arch("qwen3moe")
    with opened(path, "all", device="CPU", vram=vram_for(path, 0.5)) as llm:
        run(llm, JOB)
        assert llm.stats.break_even_tokens == 0


# --- the command line ---


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("cli") / "m.gguf")


def command(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed = ("-c", "256", "-t", "1", "-s", "1", "-n", "12", "--memory", "1G", "-p", "hello")
    return subprocess.run(
        [sys.executable, "-m", "hobbit", "run", str(model), *fixed, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_run(text_model: Path) -> None:
    plain = command(text_model, "--json")
    with running(connects=False) as server:
        done = command(
            text_model,
            "--json",
            "-v",
            "--rpc",
            server.endpoint,
            "--vram",
            "16M",
            "--dispatch",
            "split",
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"] == json.loads(plain.stdout)["text"]
    assert f"RPC0 ({server.endpoint})" in done.stderr
    assert re.search(r"\| device \d+ % \|", done.stderr.splitlines()[-1])
    assert found["plan"]["device"]["bytes"] > 0
    assert found["experts"]["device_hits"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--device", "GPU7", "--vram", "1G"), 2, "there is no device GPU7"),
        (("--vram", "1G"), 2, "name the device"),
        (("--device", "CPU", "--vram", "1"), 4, "the smallest that works is --vram"),
        (("--device", "CPU", "--vram", "many"), 2, "is not a size"),
        (("--rpc", "127.0.0.1:1"), 1, "no RPC server answers at 127.0.0.1:1"),
        (("--rpc", "nowhere"), 1, "does not name a server"),
        (("--dispatch", "both"), 2, "--dispatch both: must be one of auto, device, cpu, split"),
    ],
)
def test_bad_arguments(text_model: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = command(text_model, "-q", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
