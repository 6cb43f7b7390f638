"""Layers of llama.cpp's on a device (-ngl), with an arena for experts there and without its use.

The device is the RPC server of test_devices.py. llama.cpp's own account of what it allocated where
says that the layers are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gates import JOB, Bench, assert_same, layout_of, opened, run, settled
from mixed import MIXED, mixed, pair
from servers import Server, in_a_process, running
from test_devices import info

import hobbit
from hobbit.arena import DISPATCHES, resolve_vram
from hobbit.devices import Device
from hobbit.errors import PlanError, UsageError
from hobbit.memory import MemoryPlan
from hobbit.planning import machine
from hobbit.planning.offload import offloaded
from hobbit.planning.planner import context_of, plan
from hobbit.rule import Rule
from hobbit.streamed import ContextMemory, allocated

ARCHS = ("qwen3moe", "gpt-oss", "deepseek2", "qwen3next")
ALL = 99
SEVERAL = replace(JOB, n_seq=3, n_prompt=40, n_decode=16)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def there(server: Server, n_gpu_layers: int = ALL, **more: Any) -> dict[str, Any]:
    """Return the arguments with which layers and all experts may go to the server."""
    named = {"device": server.device, "vram": "16M", "upload": "1G", "dispatch": "split"}
    return {**named, "n_gpu_layers": n_gpu_layers, **more}


def memory_of(llm: hobbit.Llama) -> ContextMemory:
    """Return what llama.cpp has allocated for a loaded model."""
    return allocated(llm._ctx.ctx)


@pytest.mark.parametrize("n_gpu_layers", [ALL, 2, 1])
@pytest.mark.parametrize("arch", ARCHS)
def test_layers(arch: str, n_gpu_layers: int, bench: Bench, server: Server) -> None:
    """Of tiny models' 2 to 4 layers; llama.cpp counts the output as one, which goes there first."""
    path = bench.arch(arch)
    with opened(path, "floor", n_gpu_layers=0) as llm:
        here = memory_of(llm)
        lookups = run(llm), llm.stats.hits + llm.stats.misses
    assert here.offloaded == ()
    with opened(path, "floor", **there(server, n_gpu_layers)) as llm:
        assert_same(bench.stock(path), run(llm), arch)
        assert llm.stats.device_hits > 10
        assert llm.stats.misses > 0
        assert llm.stats.hits + llm.stats.misses == lookups[1], "a layer's experts were torn apart"
        found = memory_of(llm)
        (part,) = found.offloaded
        plan = llm.plan
    assert part.device == server.device
    assert part.compute > 0
    tied = found.dense + part.dense - here.dense  # embeddings that also make the logits
    assert tied in (0, layout_of(path).gguf.tensors["token_embd.weight"].nbytes)
    assert part.dense > 0
    assert found.kv + part.kv == here.kv
    assert (found.kv == 0) == (n_gpu_layers == ALL)
    assert (part.kv == 0) == (n_gpu_layers == 1)
    sizes = {line.name: line.bytes for line in plan.lines}
    assert (sizes["dense"], sizes["kv"]) == (found.dense, found.kv)
    assert [line.bytes for line in plan.layers] == [part.bytes]


@pytest.mark.parametrize("arch", sorted({*tiny.ARCHS} - {*ARCHS}))
def test_architecture(arch: str, bench: Bench, server: Server) -> None:
    path = bench.arch(arch)
    with opened(path, "floor", **there(server)) as llm:
        assert_same(bench.stock(path), run(llm), arch)
        assert llm.stats.device_hits > 10
        assert sum(part.dense for part in llm.offloaded) > 0


def test_stock_with_the_same_layers_there(bench: Bench, tmp_path: Path) -> None:
    """llama.cpp's own result with its layers, and all experts, on such a device is no other."""
    code = """
import json, sys
import numpy as np
import llama_cpp.llama_cpp as api
from hobbit.devices import Device
from hobbit.stock import Job, collect, plain_llama
from hobbit.streamed import allocated
from servers import running

path, n_gpu_layers, fields, out = sys.argv[1:]
with running() as server:
    device, default = Device(server.device), api.llama_model_default_params
    def params():
        made = default()
        made.devices = device.for_layers
        return made
    api.llama_model_default_params = params
    job = Job(**json.loads(fields))
    arguments = job.llama_arguments() | {"n_gpu_layers": int(n_gpu_layers), "use_mmap": False}
    with plain_llama(path, arguments) as llm:
        (part,) = allocated(llm._ctx.ctx).offloaded
        assert part.dense > 0
        np.save(out, collect(llm, job))
    device.close()
"""
    path = bench.arch("qwen3moe")
    for n_gpu_layers in (ALL, 2):
        out = tmp_path / f"{n_gpu_layers}.npy"
        done = in_a_process(code, path, n_gpu_layers, json.dumps(asdict(JOB)), out)
        assert done.returncode == 0, done.stderr
        assert_same(bench.stock(path), np.load(out), f"stock, -ngl {n_gpu_layers}")


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dispatch(dispatch: str, bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "half", **there(server, dispatch=dispatch)) as llm:
        for when in ("cold", "warm"):
            assert_same(bench.stock(path), run(llm), f"{dispatch}, {when}")
        stats = settled(llm)
    assert (stats.device_pairs == 0) == (dispatch == "cpu") or dispatch == "auto"


def test_several_sequences(bench: Bench, server: Server) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", SEVERAL, **there(server)) as llm:
        assert_same(bench.stock(path, SEVERAL), run(llm, SEVERAL), "three sequences")


def test_a_lossy_rule_sees_the_same_gate_weights(bench: Bench, server: Server) -> None:
    paths, rule = pair(bench, "qwen3moe"), Rule(0.3, 0.8, deterministic=True)
    with mixed(paths, "all", rule=rule) as llm:
        expected, before = run(llm, MIXED), llm.stats
    with mixed(paths, "all", rule=rule, **there(server, dispatch="cpu")) as llm:
        assert_same(expected, run(llm, MIXED), "lossy")
        assert llm.stats.pairs_low == before.pairs_low > 0
        assert llm.stats.pairs_skip == before.pairs_skip > 0


@pytest.mark.parametrize("kind", ["gate", "map"])
@pytest.mark.parametrize("arch", ["qwen3moe", "lfm2moe", "gpt-oss"])
def test_predictions(kind: str, arch: str, bench: Bench, server: Server) -> None:
    """As without: the routers are copied from the device, in whose graph they are."""
    path, counts = bench.arch(arch), []
    for n_gpu_layers in (0, ALL, 2):
        asked = there(server, n_gpu_layers, dispatch="cpu", predict=f"{kind}:always")
        with opened(path, "half", **asked) as llm:
            for _ in range(2):
                assert_same(bench.stock(path), run(llm), kind)
            counts.append((llm.stats.predicted, llm.stats.predicted_right))
    assert counts[0][1] > 10
    assert counts[1:] == [counts[0]] * 2


def test_routing_traces(bench: Bench, server: Server, tmp_path: Path) -> None:
    """With the router's softmax, which is worked out here, from numbers that are on the device."""
    path, found = bench.arch("qwen3moe"), []
    for n_gpu_layers in (0, ALL):
        asked, trace = there(server, n_gpu_layers, dispatch="cpu"), tmp_path / "trace"
        with opened(path, "half", **asked) as llm, llm.traced(trace, probs=True):
            run(llm)
        found.append((tmp_path / "trace").read_bytes())
    assert found[0] == found[1]
    assert len(found[0]) > 10_000


def test_the_cpu_gets_no_layers(bench: Bench) -> None:
    """As in llama.cpp, which keeps them where they are."""
    path = bench.arch("qwen3moe")
    with opened(path, "floor", device="CPU", vram="16M", n_gpu_layers=ALL) as llm:
        assert llm.plan.layers == memory_of(llm).offloaded == ()
        assert_same(bench.stock(path), run(llm), "CPU")


# memory


@pytest.mark.parametrize("vram", ["auto", "2G"])
def test_vram_beside_layers(vram: str) -> None:
    gib = 1 << 30
    expected = int(8 * gib * 0.9) - 3 * gib if vram == "auto" else 2 * gib
    assert resolve_vram(vram, info(), 3 * gib) == expected
    with pytest.raises(PlanError, match=r"8\.0 GiB.*, 7\.5 GiB of it for layers \(-ngl\)"):
        resolve_vram(vram, info(), 15 * gib // 2)


@pytest.fixture
def given_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Speeds as given, and nothing remembered of devices."""
    monkeypatch.setattr(machine, "_measured", lambda kind, n: {"decode": 1e10, "prompt": 1e11})
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))


class Enough(Exception):
    """The plan is there: nothing needs to be loaded."""


def loaded_plan(path: Path, n_ctx: int, **arguments: Any) -> tuple[MemoryPlan, ContextMemory]:
    """Return the plan of a model that is about to be loaded, and what it is made of."""
    found: list[tuple[MemoryPlan, ContextMemory]] = []
    llm = hobbit.Llama.__new__(hobbit.Llama)

    def stop(plan: MemoryPlan) -> None:
        found.append((plan, llm._measured))
        raise Enough

    with pytest.raises(Enough):
        llm.__init__(  # type: ignore[misc]
            str(path), n_ctx=n_ctx, n_batch=2048, n_threads=1, on_plan=stop, **arguments
        )
    return found[0]


@pytest.mark.parametrize("n_gpu_layers", [ALL, -1, 3, 1])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "granitehybrid", "jamba"])
def test_plan_from_the_header(arch: str, n_gpu_layers: int, bench: Bench, server: Server) -> None:
    """Weights and context as llama.cpp has them, and buffers of at least that size."""
    path = bench.arch(arch)
    layout = layout_of(path)
    named = {"device": server.device, "vram": "1M", "memory": "4G"}
    real, measured = loaded_plan(path, 512, n_gpu_layers=n_gpu_layers, **named)
    (part,) = measured.offloaded
    made = offloaded(layout, context_of(layout, 512, 512, 1, 1), n_gpu_layers, server.device)
    assert made.device == part.device
    assert part.kv <= made.kv <= 1.01 * part.kv
    assert 0 <= part.dense - made.dense < 4096  # tensors are padded
    assert part.compute <= made.compute + (1 << 20)
    assert real.layers == (part.line,)
    assert "not part of the cap" in real.describe()
    assert real.to_dict()["layers"] == [asdict(part.line)]


def test_plan_tells_what_a_run_does(bench: Bench, given_speeds: None, server: Server) -> None:
    """What goes where, by the header as by llama.cpp; what the device has is not in the cap."""
    path = bench.arch("qwen3moe", n_layer=8)
    common: dict[str, Any] = {"device": server.device, "memory": "3G"}
    real, measured = loaded_plan(path, 32768, n_gpu_layers=ALL, vram="auto", **common)
    less, _ = loaded_plan(path, 32768, n_gpu_layers=0, vram="auto", **common)
    asked: dict[str, Any] = {"n_ctx": 32768, "n_threads": 1, "read_gbps": 1.0, **common}
    made = plan(path, n_gpu_layers=ALL, **asked)
    assert made.memory is not None
    (layers,) = made.memory.layers
    assert layers.bytes >= real.layers[0].bytes == measured.offloaded[0].bytes > 50 << 20
    sizes = [{line.name: line.bytes for line in p.lines} for p in (made.memory, real, less)]
    for name in ("dense", "kv"):
        assert sizes[0][name] == sizes[1][name] < sizes[2][name]
    assert abs(sizes[0]["scratch"] - sizes[1]["scratch"]) < 4096
    for found in (made.memory, real, less):
        assert sum(line.bytes for line in found.lines) + found.spare_bytes == 3 << 30
    assert made.to_dict()["memory"]["layers"] == [asdict(layers)]
    with pytest.raises(UsageError, match="-ngl: layers of which device"):
        plan(path, n_gpu_layers=ALL, n_threads=1, read_gbps=1.0)


def test_a_card_that_is_not_here(bench: Bench, given_speeds: None) -> None:
    """Layers and experts share what it has."""
    path = bench.arch("qwen3moe")
    asked: dict[str, Any] = {"n_threads": 1, "read_gbps": 1.0, "memory": "2G"}
    without = plan(path, vram="4M", **asked).memory
    made = plan(path, vram="64M", n_gpu_layers=-1, **asked).memory
    assert without is not None and without.device is not None and without.layers == ()
    assert made is not None and made.device is not None
    assert made.layers[0].bytes + made.device.bytes <= 64 << 20
    with pytest.raises(PlanError, match=r"of it for layers \(-ngl\)"):
        plan(path, vram="4M", n_gpu_layers=-1, **asked)
    with pytest.raises(PlanError, match=r"^vram 64.0 KiB: .* leaves nothing for experts"):
        plan(path, vram="64K", n_gpu_layers=-1, **asked)


def test_auto_leaves_room_for_layers(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that has little free: a model that is loaded, and a plan."""
    path = bench.arch("qwen3moe", n_embd=256, n_ff=1024, n_expert=16)
    layout = layout_of(path)
    taken = offloaded(layout, context_of(layout, 512, 512, 1, 1), -1, "").bytes
    free = int((taken + layout.expert_bytes // 2) / 0.9)
    opens = Device.__init__

    def with_little(self: Device, name: str, n_threads: int = 1) -> None:
        opens(self, name, n_threads)
        self.info = replace(self.info, free_bytes=free)

    monkeypatch.setattr(Device, "__init__", with_little)
    monkeypatch.setattr(machine, "_measured", lambda kind, n: {"decode": 1e10, "prompt": 1e11})
    common: dict[str, Any] = {"device": server.device, "vram": "auto", "memory": "2G"}
    for n_gpu_layers in (0, -1):
        real, measured = loaded_plan(path, 512, n_gpu_layers=n_gpu_layers, **common)
        asked: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "read_gbps": 1.0, **common}
        made = plan(path, n_gpu_layers=n_gpu_layers, **asked)
        there = sum(part.bytes for part in measured.offloaded)
        for found, layers in ((real, there), (made.memory, taken if n_gpu_layers else 0)):
            assert found is not None and found.device is not None
            assert found.device.bytes + layers <= 0.9 * free
            assert found.device.bytes + layers > 0.9 * free - (1 << 20) or not n_gpu_layers
