"""scripts/first-light on models of a few MB: its arms agree, its table says what the runs say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmodels
import first_light
import pytest

from hobbit.cgroup import MemoryGroup
from hobbit.errors import CapUnavailable, HobbitError

BENCH = Path(first_light.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.gguf"
    shape = replace(
        benchmodels.SHAPES["olmoe-1b-7b"], n_layer=2, n_embd=256, n_head=4, n_head_kv=4,
        head_dim=64, n_ff=256, n_expert=8, n_expert_used=2, n_vocab=512,
    )  # fmt: skip
    benchmodels.synthesize("small", shape, benchmodels.SYNTHETIC_TYPES["Q8_0"], path)
    return path


def run_arm(model: Path, engine: str, **changes: Any) -> dict[str, Any]:
    job = {
        "engine": engine,
        "model": str(model),
        "memory": 0,
        "threads": 1,
        "text": "",
        "seed": 1,
        "prompt": 0,
        "warm_up": 2,
        "decode": 6,
        "hashed": 8,
    }
    command = [sys.executable, str(BENCH / "first_light_arm.py"), json.dumps(job | changes)]
    return first_light.parse_run(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    )


def test_arms_do_the_same_work(model: Path) -> None:
    stock, ours = (run_arm(model, engine) for engine in ("stock-mmap", "hobbit"))
    assert stock["logits_sha256"] == ours["logits_sha256"]
    assert stock["decode_tok_s"] > 0
    assert ours["decode_tok_s"] > 0
    assert ours["hits"] + ours["misses"] == 6 * 2 * 2
    assert ours["dense_bytes"] < model.stat().st_size


def test_arms_agree_on_a_prompt_too(model: Path) -> None:
    text = str(BENCH / "text.txt")
    changes = {"prompt": 40, "decode": 4, "hashed": 7, "text": text}
    stock, ours = (run_arm(model, engine, **changes) for engine in ("stock-memory", "hobbit"))
    assert stock["logits_sha256"] == ours["logits_sha256"]
    assert stock["prompt_tok_s"] > 0


def test_a_failed_arm_is_named(model: Path) -> None:
    with pytest.raises(HobbitError, match="an arm failed"):
        run_arm(model.with_name("absent.gguf"), "stock-mmap")


def test_the_whole_file_is_read_and_dropped(model: Path) -> None:
    try:
        os.close(os.open(model, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{model.parent} is on a file system without direct I/O")
    assert first_light.read_rate(model) > 0
    first_light.drop_from_page_cache(model)


@pytest.mark.skipif(os.geteuid() != 0, reason="a memory cgroup needs root")
def test_the_cap_kills_what_exceeds_it() -> None:
    try:
        with MemoryGroup(100 << 20) as group:
            fits = group.run([sys.executable, "-c", "x = bytearray(40 << 20); print(len(x))"])
            assert (fits.returncode, fits.stdout) == (0, f"{40 << 20}\n")
            assert group.peak_bytes is None or 40 << 20 < group.peak_bytes <= 100 << 20
            assert group.run([sys.executable, "-c", "bytearray(200 << 20)"]).returncode == -9
        assert not group.path.exists()
    except CapUnavailable as exc:
        pytest.skip(str(exc))


def test_the_table_says_what_was_missed() -> None:
    def run(rate: float, **more: Any) -> dict[str, Any]:
        known = {
            "peak_rss_bytes": 2 << 30,
            "load_s": 1.0,
            "load_disk_bytes": 1 << 30,
            "load_call_bytes": 1 << 20,
        }
        return {"decode_tok_s": rate, "logits_sha256": "a", "peak_bytes": 2200 << 20} | known | more

    ours = {"dense_bytes": 1 << 29, "hits": 60, "misses": 40}
    result = {
        "cap_bytes": 2200 << 20,
        "disk_bytes_s": float(1 << 30),
        "runs": {
            "stock": [run(r) for r in (0.3, 0.5, 0.4)],
            "hobbit": [run(r, **ours) for r in (6.0, 3.9, 4.0)],
        },
    }
    machine = first_light.machine()
    report = {"machine": machine, "comparisons": {"olmoe-capped": result}}
    lines = list(first_light.table(report))
    assert any(machine["commit"] in line for line in lines)
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert "| 0.40 (0.30-0.50) | 4.00 (3.90-6.00) | 10.00 |" in rows["decode tok/s"]
    assert "MISSED" in rows["decode tok/s"]
    assert "2200.0 or less: met" in rows["peak of the process MiB"]
    assert "2200 (2200-2200)" in rows["peak with page cache MiB"]
    assert "1.5 or less: met" in rows["load s"]
    assert "60.0%" in rows["expert hits"]
    assert "| yes |" in rows["logits identical"]


def test_options_are_checked() -> None:
    with pytest.raises(SystemExit):
        first_light.parse_args(["--only", "nonsense"])
    assert first_light.parse_args([]).runs == 5
