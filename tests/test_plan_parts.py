"""The plan's parts from a header alone: they are those that a loaded model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sparse
import tiny
from gates import layout_of

import hobbit
from hobbit import demo
from hobbit.errors import PlanError
from hobbit.memory import Cap, MemoryPlan, SlotBytes
from hobbit.planning import machine
from hobbit.planning.parts import Context, fixed_parts, kv_bytes, slot_bytes
from hobbit.planning.planner import Forecast, context_of
from hobbit.planning.planner import plan as planned

MIB = 1 << 20
# Architectures whose attention or recurrence has buffers of its own: only a few MiB in a tiny one.
UNUSUAL = {
    "deepseek32": 12, "deepseek4": 24, "dots3note": 12, "glm-dsa": 12, "glm5-next": 20,
    "granitehybrid": 8, "hy_v4": 13, "minimax-01": 10, "nemotron_h_moe": 6, "qwen35moe": 6,
    "qwen3next": 6, "qwen4exp": 14,
}  # fmt: skip


@pytest.fixture(autouse=True)
def given_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds as given: nothing is measured here."""
    monkeypatch.setattr(machine, "_measured", lambda kind, n: {"decode": 1e10, "prompt": 1e11})


class Enough(Exception):
    """The plan is there: nothing needs to be loaded."""


def loaded_plan(path: Path, n_ctx: int, memory: str | int = "8G", **more: Any) -> MemoryPlan:
    """Return the plan of a model that is about to be loaded: llama.cpp says what it allocates."""
    plans: list[MemoryPlan] = []

    def stop(plan: MemoryPlan) -> None:
        plans.append(plan)
        raise Enough

    with pytest.raises(Enough):
        hobbit.Llama(
            str(path), memory=memory, n_ctx=n_ctx, n_batch=2048, n_threads=1, on_plan=stop, **more
        )
    return plans[0]


def differences(
    path: Path, real: MemoryPlan, n_ctx: int, slack: int = 4 * MIB, **more: Any
) -> dict[str, Any]:
    """Return the parts that are off by more than a tenth and the slack; not the process's own."""
    context = Context(n_ctx, more.get("n_ubatch", 512), flash=more.get("flash_attn", False))
    guessed = {line.name: line.bytes for line in fixed_parts(layout_of(path), context, 8 << 30)}
    return {
        line.name: (line.bytes, guessed.get(line.name))
        for line in real.lines
        if line.name not in ("experts", "process")
        and abs(line.bytes - guessed.get(line.name, 0)) > max(line.bytes // 10, slack)
    }


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_every_architecture_takes_what_the_header_says(arch: str, tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "m.gguf", arch)
    slack = UNUSUAL.get(arch, 4) * MIB
    real = loaded_plan(path, 512)
    assert differences(path, real, 512, slack) == {}
    sizes = {SlotBytes(*pool.slot_bytes) for pool in real.pools}
    assert {*slot_bytes(layout_of(path))} == sizes


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("olmoe", {}),
        ("olmoe", {"flash_attn": True}),
        ("olmoe", {"n_ubatch": 128}),
        ("qwen3moe", {}),
        ("llama", {"flash_attn": True}),
        ("granitemoe", {}),
    ],
)
@pytest.mark.parametrize("n_ctx", [1024, 8192])
def test_real_sizes_take_what_the_header_says(
    arch: str, settings: dict[str, Any], n_ctx: int, tmp_path: Path
) -> None:
    shape = {"n_expert": 16, "n_used": 4, "n_embd": 2048, "n_ff": 768, "n_layer": 4, "n_head": 16}
    path = sparse.make(tmp_path / "m.gguf", arch, 64000, **shape)
    assert differences(path, loaded_plan(path, n_ctx, **settings), n_ctx, **settings) == {}


def test_the_demo_takes_what_the_header_says() -> None:
    path = demo.ensure()
    made = planned(path, "700M", n_threads=1, read_gbps=1.0).memory
    assert made is not None
    assert sum(line.bytes for line in made.lines) + made.spare_bytes == made.cap.bytes
    real = loaded_plan(path, 4096, made.cap.bytes)
    assert differences(path, real, 4096) == {}
    assert made.mode == real.mode == "streamed"
    assert abs(made.cache_bytes - real.cache_bytes) < 0.1 * made.cap.bytes


def test_a_quantised_cache_is_smaller(tmp_path: Path) -> None:
    gguf = layout_of(sparse.make(tmp_path / "m.gguf", "olmoe", n_embd=256)).gguf
    whole = kv_bytes(gguf, Context(1024))
    assert kv_bytes(gguf, Context(1024, type_k=8, type_v=8)) == whole * 34 // 64
    assert kv_bytes(gguf, Context(2048)) == 2 * whole


def test_the_context_is_what_run_would_take(tmp_path: Path) -> None:
    layout = layout_of(tiny.make(tmp_path / "m.gguf", "olmoe"))  # trained with 512
    assert context_of(layout, None, 512, 1, 1).n_ctx == 512
    assert context_of(layout, 300, 512, 1, 1) == Context(512, 512)
    assert context_of(layout, 0, 2048, 1, 8) == Context(512, 512, 1, 8, flash=True)


def test_the_cap_that_a_refusal_names_works(tmp_path: Path) -> None:
    path = sparse.make(tmp_path / "m.gguf", "olmoe", n_embd=1024, n_ff=512)
    found = planned(path, "20M", n_threads=1, read_gbps=1.0)
    assert not found.fits
    assert found.tok_s == (0.0, 0.0)
    assert found.limit == "memory"
    again = planned(path, found.needed_bytes, n_threads=1, read_gbps=1.0)
    assert again.fits
    forecast: Forecast = again.forecast
    with pytest.raises(PlanError):
        forecast.memory(Cap(forecast.smallest - 32 * MIB, "as asked"))
