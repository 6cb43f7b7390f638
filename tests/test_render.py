from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from moefile import write_moe
from test_layout import fake, stack

from hobbit import render
from hobbit.generate import Result
from hobbit.gguf_file import open_gguf
from hobbit.layout import Layout, build_layout
from hobbit.memory import Cap, Line, MemoryPlan, plan
from hobbit.quality import EXACT_NAME, Quality
from hobbit.render import Screen
from hobbit.rule import EXACT as EXACT_RULE
from hobbit.stats import Stats

GIB = 1 << 30
EXACT = Quality(EXACT_NAME, EXACT_RULE)
STATS = Stats(
    tokens_prompt=214,
    tokens_generated=127,
    prompt_s=6.3,
    decode_s=26.4,
    ttft_s=6.2,
    hits=710,
    misses=290,
    read_bytes=212 * 127 << 20,
    stall_s=10.56,
    cap_bytes=8 * GIB,
    peak_bytes=int(7.6 * GIB),
    mode="streamed",
    io="direct",
)
RESULT = Result(
    "text", "stop", STATS, Stats(**{**STATS.__dict__, "tokens_prompt": 0, "prompt_s": 0})
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return build_layout(open_gguf(write_moe(tmp_path / "m.gguf", kind="Q8_0")))


def a_plan(cap: int, *lines: tuple[str, int]) -> MemoryPlan:
    parts = [Line(name, size) for name, size in lines]
    return plan(Cap(cap, "as asked"), build_layout(fake(stack(0))), parts)


def test_stats_line() -> None:
    assert render.stats_line(RESULT, EXACT) == (
        "[128 tok, 4.81 tok/s, first token 6.2 s (214 tok prompt, 34.0 tok/s) | mem 7.6/8.0 GiB "
        "| exact | hit 71 % | 212 MiB/tok | stall 40 %]"
    )


def test_stats_line_of_a_dense_model() -> None:
    dense = Stats(tokens_prompt=2, tokens_generated=3, mode="resident", cap_bytes=1 << 30)
    line = render.stats_line(Result("", "stop", dense, dense), EXACT)
    assert line.endswith("mem 0/1024 MiB | resident]")


def test_stats_line_of_nothing() -> None:
    line = render.stats_line(Result("", "cancelled", Stats(), Stats(), KeyboardInterrupt()), EXACT)
    assert "0 tok, 0.00 tok/s, no token (0 tok prompt, 0.00 tok/s)" in line
    assert line.endswith("| cancelled]")


def test_model_line(layout: Layout) -> None:
    assert (
        render.model_line(layout) == "llama 197K-A124K F32 348.2 KiB, 2 layers x 4 experts, top-2"
    )


def test_model_line_of_a_dense_model(tmp_path: Path) -> None:
    dense = build_layout(open_gguf(write_moe(tmp_path / "m.gguf", dense=True)))
    assert render.model_line(dense).endswith(", 2 layers, dense")


def test_model_line_with_leading_dense_layers() -> None:
    layout = build_layout(fake(stack(1) | stack(2), **{"llama.block_count": 3}))
    assert "2 of 3 layers x 4 experts" in render.model_line(layout)


@pytest.mark.parametrize("cap", [3 * GIB, 5 * GIB, 8 * GIB, 777 * GIB, (8 * GIB) // 3])
@pytest.mark.parametrize("share", [0.011, 0.2, 0.3333])
def test_memory_split_adds_up(cap: int, share: float) -> None:
    sizes = [("dense", int(cap * share)), ("kv", int(cap * share / 7)), ("process", 123456789)]
    line = render.memory_split(a_plan(cap, *sizes))
    match = re.fullmatch(r"([\d.]+) (?:GiB|MiB) cap \((.*)\)", line)
    assert match
    parts = [float(part.split()[1]) for part in match[2].split(" + ")]
    assert sum(parts) == pytest.approx(float(match[1]))


def test_mode_line() -> None:
    line = render.mode_line(a_plan(8 * GIB, ("dense", 2 * GIB), ("kv", 3 * GIB)), EXACT)
    assert line == (
        "mode: all experts fit in the cache, exact   "
        "memory 8.0 GiB cap (dense 2.0 + kv 3.0 + spare 3.0)"
    )


@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        ("as asked", 0),
        ("auto: available on this machine, less 1.0 GiB", 0),
        ("50% of this machine's memory", 1),
        ("64.0 GiB asked, but this machine's memory is 24.0 GiB", 1),
        ("as asked; only 2.0 GiB is available now", 1),
    ],
)
def test_a_cap_that_is_not_as_asked_says_why(reason: str, lines: int) -> None:
    said = render.cap_lines(plan(Cap(8 * GIB, reason), build_layout(fake(stack(0))), []))
    assert said == [f"memory cap: {reason}"][:lines]


def test_resident_lines() -> None:
    tensors = stack(0) | {"blk.0.ffn_up_exps.weight": ((8, 16, 3), 0)} | stack(1)
    (line,) = render.resident_lines(build_layout(fake(tensors)))
    assert line == (
        "resident: blk.0.ffn_gate_exps.weight and 2 more: its layer mixes expert counts: [3, 4]"
    )


def test_verbose_lines() -> None:
    lines = render.verbose_lines(RESULT, 1.5)
    assert [line.split(":")[0] for line in lines[:8]] == [
        "total duration",
        "load duration",
        "prompt eval count",
        "prompt eval duration",
        "prompt eval rate",
        "eval count",
        "eval duration",
        "eval rate",
    ]
    assert lines[8] == "peak memory:          7.6/8.0 GiB"
    assert "710 of 1000" in "".join(lines)
    assert "low precision" not in "".join(lines)
    lossy = replace(STATS, pairs_high=70, pairs_low=20, pairs_skip=10)
    lines = render.verbose_lines(replace(RESULT, stats=lossy), 1.5)
    assert "low precision:        20 of 100 pairs, 10 skipped" in lines


PREDICTED = Stats(
    tokens_generated=100, decode_s=10.0, moe_s=3.7, stall_s=1.2, predict_s=0.05, mode="streamed",
    predictor="gate", predicted=50, predicted_right=41, ahead_bytes=810 << 20,
    ahead_wasted_bytes=81 << 20,
)  # fmt: skip


def token_lines(decode: Stats) -> list[str]:
    lines = render.verbose_lines(Result("", "stop", STATS, decode), 1.5)
    return lines[lines.index("waited for reads:     10.56 s") + 1 :]


def test_verbose_lines_on_a_token() -> None:
    assert token_lines(PREDICTED) == [
        "prediction:           gate, 82 % right; 8.1 MiB a token read ahead, 10 % of it in vain",
        "time of a token:      100 ms: experts 37 ms, waiting 12 ms, predicting 0.5 ms, "
        "cache 0.0 ms, the rest 50 ms",
    ]
    (line, _) = token_lines(replace(PREDICTED, predictor="none", ahead_bytes=0))
    assert line == "prediction:           none, 82 % right when tried"
    (line, _) = token_lines(replace(PREDICTED, predictor="none", ahead_bytes=0, predicted=0))
    assert line == "prediction:           none"


def test_nothing_is_said_of_predictions_that_are_not_made() -> None:
    (line,) = token_lines(replace(PREDICTED, mode="resident-experts"))
    assert line.startswith("time of a token:")
    assert token_lines(replace(PREDICTED, tokens_generated=0)) == []


def test_a_tokens_time_adds_up() -> None:
    parts = render.token_time(Result("", "stop", STATS, PREDICTED))
    assert [*parts] == ["experts", "waiting", "predicting", "cache", "the rest"]
    assert sum(parts.values()) == pytest.approx(100)
    for none in (replace(PREDICTED, tokens_generated=0), replace(PREDICTED, mode="resident")):
        assert render.token_time(Result("", "stop", STATS, none)) == {}


def test_report() -> None:
    report = render.run_report(RESULT, a_plan(8 * GIB), EXACT, {"seed": 5}, 1.0)
    data = json.loads(json.dumps(report))
    assert set(data) == {
        "schema",
        "text",
        "finish_reason",
        "usage",
        "timings",
        "token",
        "memory",
        "experts",
        "quality",
        "mode",
        "config",
        "plan",
    }
    assert data["usage"] == {"prompt_tokens": 214, "completion_tokens": 128, "total_tokens": 342}
    assert data["timings"]["predicted_per_second"] == pytest.approx(127 / 26.4)
    assert data["timings"]["prompt_n"] == 214
    assert data["token"] == render.token_time(RESULT)
    assert data["mode"] == data["plan"]["mode"] == "resident-experts"
    assert {"predictor", "prediction_accuracy", "bytes_read_ahead"} <= set(data["experts"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    plain, terminal = io.StringIO(), Terminal()
    Screen(stream=plain).say("x")
    Screen(stream=terminal).say("x")
    assert (plain.getvalue(), terminal.getvalue()) == ("x\n", "\x1b[2mx\x1b[0m\n")
    assert not Screen(stream=terminal, color="never").color
    assert Screen(stream=plain, color="always").color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen(stream=terminal).color


def test_quiet_still_reports_errors() -> None:
    stream = io.StringIO()
    screen = Screen(quiet=True, stream=stream)
    screen.say("nothing")
    with screen.progress() as report:
        report("stage", 0.5)
    screen.error("two\nlines", "do this")
    assert stream.getvalue() == "hobbit: error: two lines\nhint: do this\n"


def test_progress_in_a_log_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Screen(stream=stream).progress() as report:
        for done in range(40):
            report("building", done / 40)
            now[0] += 1
        report("writing", 0)
    assert stream.getvalue().splitlines() == [
        "building",
        "building: 25 %",
        "building: 50 %",
        "building: 75 %",
        "writing",
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Screen(stream=stream).progress() as report:
        report("building", 0.5)
        report("building", 1.0)
    assert "building" in stream.getvalue()
