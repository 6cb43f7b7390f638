from __future__ import annotations

import json
import math
from dataclasses import replace

from hobbit.choices import ChoiceRow
from hobbit.evaluate import Row
from hobbit.report import eval_lines, eval_report, task_lines, too_far
from hobbit.rule import EXACT, Rule

ROW = Row(
    "exact", EXACT, 900, 12.5, 0.0, 0.0, 0.0, 0.0, 1.0, 100 << 20, 0.0, 1.0, 0.0, 0.0, 0.5, 8.0, 9.0
)
FAST = replace(
    ROW, mode="fast", rule=Rule(0.6, 0.9), kl=0.0765, kl_se=0.0012, kl_p99=0.51, kl_max=1.2345,
    top1=0.913, bytes_per_token=50 << 20, high=0.7, low=0.25, skipped=0.05, perplexity=13.0,
)  # fmt: skip
ANSWERS = ChoiceRow("fast", 46, 0.5, 0.0737, 0.522, 0.0736, 0.957, 1.0)


def squeezed(line: str) -> str:
    return " ".join(line.split())


def test_table() -> None:
    lines = eval_lines([ROW, FAST])
    assert squeezed(lines[0]) == (
        "mode KL mean +- KL p99 KL max top-1 ppl MiB/tok fewer high low skip hit tok/s"
    )
    assert squeezed(lines[2]) == (
        "fast 0.07650 0.00120 0.5100 1.234 91.3% 13.000 50.0 2.00x 70.0% 25.0% 5.0% 50.0% 8.00"
    )
    assert len({len(line) for line in lines}) == 1


def test_nothing_read_is_not_a_ratio() -> None:
    lines = eval_lines([ROW, replace(FAST, bytes_per_token=0.0)])
    assert lines[2].split()[7:9] == ["0.0", "-"]


def test_tasks() -> None:
    lines = task_lines("t.jsonl", [ANSWERS])
    assert lines[0] == "t.jsonl"
    assert squeezed(lines[2]) == "fast 46 50.0% 7.4% 52.2% 7.4% 95.7% 100.0%"


def test_too_far() -> None:
    assert too_far([ROW, FAST], 0.08) == []
    assert too_far([ROW, FAST], 0.0765) == []
    assert too_far([ROW, FAST], 0.05) == ["fast: mean KL 0.07650 is above --max-kld 0.05"]
    assert len(too_far([ROW, replace(FAST, kl=math.nan), replace(FAST, kl=math.inf)], 9)) == 2


def test_json() -> None:
    facts = {"model": "m.gguf"}
    report = eval_report([ROW, replace(FAST, kl_max=math.inf)], {"t.jsonl": [ANSWERS]}, facts)
    data = json.loads(json.dumps(report, allow_nan=False))
    assert data["schema"] == "hobbit.eval/1"
    assert data["model"] == "m.gguf"
    assert [mode["mode"] for mode in data["modes"]] == ["exact", "fast"]
    assert data["modes"][1]["rule"]["t1"] == 0.6
    assert data["modes"][1]["kl_max"] is None
    assert set(data["modes"][0]) == set(Row.__dataclass_fields__)
    assert data["tasks"] == [{"file": "t.jsonl", "modes": [ANSWERS.__dict__]}]
