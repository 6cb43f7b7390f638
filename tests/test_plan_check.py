"""scripts/plan-check on a report of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plan_check
import pytest
import sparse
from gates import layout_of

from hobbit.planning.estimate import work_of


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    speed = {"decode": 1e9, "prompt": 1e10}
    monkeypatch.setattr("hobbit.planning.machine._measured", lambda kind, n: speed)
    shape = {"n_expert": 16, "n_used": 2, "n_embd": 512, "n_ff": 2048, "n_layer": 4}
    return sparse.make(tmp_path / "m.gguf", "olmoe", **shape)


def row(model: Path, mem_bytes: int, mib: float, **more: Any) -> dict[str, Any]:
    return {
        "model_filename": model.name,
        "test": "tg8",
        "mode": "exact",
        "policy": "decay",
        "predict": "auto",
        "mem_bytes": mem_bytes,
        "read_bps": 0,
        "disk_bytes_s": 1e6,
        "median_ts": 10.0,
        "mib_per_token": mib,
        "n_depth": 0,
        "n_prompt": 8,
        "n_gen": 8,
        "n_ubatch": 512,
        "n_threads": 1,
        "type_k": "f16",
        "type_v": "f16",
        "samples": [{"cached_share": 0.5}],
    } | more


def test_a_run_tells_the_next_rows_their_hits(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layout_of(model)
    token = work_of(layout).token_bytes / (1 << 20)
    forecast = plan_check.forecast_for(row(model, 0, 0.0), layout)
    room = forecast.everything - layout.expert_bytes // 2
    # Without favourites: half of the experts cached, half of a token read.
    rows = [row(model, room, token / 2) for _ in range(2)]
    rows += [row(model, room, 0.0, predict="none"), row(model, room, 0.0, mode="stock")]
    report = tmp_path / "report.json"
    report.write_text(json.dumps(rows))
    assert plan_check.main([str(report), "--models-dir", str(tmp_path)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| m |")]
    first, second = ([cell.strip() for cell in line.split("|")] for line in table)
    assert first[:9] == second[:9]
    before, after = (int(second[i].removesuffix(" %")) for i in (8, 9))
    assert first[9] == "" and after < before, table


def test_what_cannot_be_compared_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps([row(model, 1 << 30, 0.0, type_k="q8_0")]))
    assert plan_check.main([str(report), "--models-dir", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plan-check: m.gguf: only rows with f16")
    assert plan_check.main([str(tmp_path / "absent.json")]) == 1
