"""scripts/gpu-report on the stand-in: all of it but the CUDA build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_report
import pytest
import tiny
from gates import layout_of
from servers import running

from hobbit.bench import Case, file_bytes
from hobbit.errors import UsageError

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu-report"
CASE = Case(32, 8, n_ubatch=32, n_threads=1)
PLACE = gpu_report.Place(None, "127.0.0.1:1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its experts are most of it, as in real ones: 38 MiB in six layers."""
    path = tmp_path_factory.mktemp("gpu") / "m.gguf"
    shape = {"n_embd": 256, "n_ff": 1024, "n_layer": 6, "n_expert": 8}
    return tiny.make(path, "qwen3moe", expert_type="Q8_0", **shape)


def test_the_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with running(connects=False) as server:
        asked = ["--rpc", server.endpoint, "--quick", "--model", str(model), "--random"]
        assert gpu_report.main([*asked, "--threads", "1", "--no-tests", "--out", str(out)]) == 0
    report = Path(capsys.readouterr().out.strip())
    data = json.loads(report.with_suffix(".json").read_text())
    assert report == out / f"REPORT-{data['machine']['date']}.md"
    text = report.read_text()
    assert "**A stand-in**" in text
    assert "within an NMSE of 0.01: passed" in text and "hits on the device" in text
    (found,) = data["models"]
    assert [part["share"] for part in found["parts"]] == [0.25, 0.5]
    for part in found["parts"]:
        rows = {row["mode"]: row for row in part["rows"] if row["test"] == "tg8"}
        assert [*rows] == ["n-cpu-moe", "dense there", "dense here"]
        there, here = (rows[f"dense {name}"] for name in ("there", "here"))
        assert rows["n-cpu-moe"]["hobbit_device"] is None
        assert there["hobbit_device"] == here["hobbit_device"] == "RPC0"
        assert 0 < there["hobbit_device_vram_bytes"] < here["hobbit_device_vram_bytes"]
        assert here["hobbit_device_vram_bytes"] <= part["vram_bytes"]
    assert text.count("1.3 or more: ") == text.count("1 or more: ") == 2


def test_llama_cpp_gets_what_fits(model: Path) -> None:
    layout = layout_of(model)
    layer = layout.expert_bytes // 6
    dense = gpu_report.beside_experts(layout, CASE)
    assert gpu_report.layers_off(layout, 6 * layer) == 0
    assert gpu_report.layers_off(layout, 4 * layer + 1) == 2
    assert gpu_report.layers_off(layout, 0) == 6
    assert gpu_report.layers_off(layout, -1) is None
    arms, notes = gpu_report.arms_of(layout, CASE, dense + layer, PLACE)
    assert arms[0].arguments == {"n_gpu_layers": 999, "n_cpu_moe": 5}
    assert notes[0].startswith("llama.cpp: --n-cpu-moe 5, the experts of 1 layers on the device")
    arms, notes = gpu_report.arms_of(layout, CASE, 1000, PLACE)
    assert [arm.name for arm in arms] == ["n-cpu-moe"]
    assert arms[0].arguments == {"n_gpu_layers": 0}
    assert len(notes) == 3
    assert gpu_report.least_vram(layout, CASE.n_ubatch) < file_bytes(layout.gguf)


def test_stock_keeps_experts_off_the_gpu(model: Path) -> None:
    """llama.cpp says of each tensor that it was told where to put it."""
    code = """
import sys
from hobbit.stock import plain_llama
with plain_llama(sys.argv[1], {"n_ctx": 64, "n_threads": 1, "verbose": True}, n_cpu_moe=2): pass
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True
    )
    told = [line for line in done.stderr.splitlines() if "overridden" in line]
    found = {name for n in range(6) for name in [f"blk.{n}."] if any(name in t for t in told)}
    assert found == {"blk.0.", "blk.1."}
    assert len({line.split()[1] for line in told}) == 2 * 3


def test_the_better_arm_is_compared() -> None:
    parts: dict[str, Any] = dict.fromkeys(gpu_report._PARTS, 0.0)
    slow = parts | {"total_s": 0.1, "stall_s": 0.06, "device_wait_s": 0.03}

    def row(mode: str, test: str, rate: float) -> dict[str, Any]:
        return {"mode": mode, "test": test, "median_ts": rate, "breakdown": slow}

    rows = [row("n-cpu-moe", "tg8", 10.0), row("dense there", "tg8", 12.0)]
    rows += [row("dense here", "tg8", 14.0), row("n-cpu-moe", "pp32", 9.0)]
    lines = gpu_report.compared([*rows, row("dense here", "pp32", 8.0)])
    assert "| tg8 | 10.00 t/s | 14.00 t/s | dense here | 1.40 | 1.3 or more: met |" in lines[2]
    assert "waiting for reads 60%, waiting for the device 30%" in lines[2]
    assert "0.89 | 1 or more: MISSED" in lines[3]


def test_which_device() -> None:
    with pytest.raises(UsageError, match=r"this llama\.cpp sees no GPU: name another"):
        gpu_report.chosen(None, None)
    with pytest.raises(UsageError, match="there is no device CUDA0: there is CPU"):
        gpu_report.chosen("CUDA0", None)
    assert gpu_report.chosen("CPU", None).flags == ["--device", "CPU"]
    assert PLACE.arguments == {"rpc": "127.0.0.1:1"}


def test_without_a_gpu_or_a_compiler_the_script_says_so(tmp_path: Path) -> None:
    def said(path: str, *arguments: str) -> str:
        done = subprocess.run(
            [SCRIPT, *arguments],
            env={**os.environ, "PATH": path, "CUDA_HOME": str(tmp_path)},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        return line

    usual = "/usr/bin:/bin"  # without a driver's nvidia-smi
    assert "no NVIDIA GPU answers here" in said(usual)
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (fake / "nvidia-smi").chmod(0o755)
    assert "no CUDA compiler (nvcc)" in said(f"{fake}:{usual}")
    assert "--wheels needs a folder" in said(usual, "--wheels")
