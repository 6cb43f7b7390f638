"""Calibration of a real, tiny model with a low copy: small numbers, but all of the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from gates import layout_of

import hobbit
from hobbit.calibrate import Effort, calibrate
from hobbit.calibration import load, path_of, rule_for, save
from hobbit.evaluate import Row, Sample, evaluate
from hobbit.fingerprint import fingerprint
from hobbit.forced import Forced
from hobbit.gguf_file import open_gguf
from hobbit.rule import ALL_LOW, EXACT, Rule
from hobbit.search import MAX_MEASUREMENTS
from hobbit.verify import cache_bytes

SAMPLE = Sample(window=96, limit=288)
TEXT = "it is the end of a day and they were not at home with you by the " * 40


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("calibrate")
    kinds = {"high": "Q8_0", "low": "Q4_0"}
    return tuple(  # type: ignore[return-value]
        tiny.make(folder / f"{name}.gguf", "qwen3moe", kind, n_used=4)
        for name, kind in kinds.items()
    )


@pytest.fixture
def llm(paths: tuple[Path, Path]) -> hobbit.Llama:
    high, low = paths
    size = cache_bytes(layout_of(high), "half")
    return hobbit.Llama(
        str(high), low=str(low), rule=ALL_LOW, n_ctx=256, n_threads=1, memory="1G",
        cache_bytes=size,
    )  # fmt: skip


def rows(llm: hobbit.Llama, *rules: Rule, sample: Sample = SAMPLE) -> list[Row]:
    model, modes = Forced(llm), [(str(rule), rule) for rule in rules]
    return evaluate(llm, model.tokens(TEXT), modes, sample, bos=model.bos)


def test_lossy_rules_differ_from_exact_and_off_is_off(llm: hobbit.Llama) -> None:
    with llm:
        off = Rule(1.0, 1.0, deterministic=True)
        exact, same, low, skip = rows(llm, off, ALL_LOW, Rule(0.0, 0.0, deterministic=True))
        assert (same.kl, same.kl_max, same.top1, same.high) == (0, 0, 1, 1)
        assert low.kl > 0 and (low.high, low.low) == (0, 1)
        assert skip.kl > low.kl and (skip.high, skip.skipped) == (0.25, 0.75)
        assert low.bytes_per_token < exact.bytes_per_token
        assert low.low_bytes_per_token == low.bytes_per_token > exact.low_bytes_per_token == 0


def test_wide_steps_of_a_rule_for_each_token(llm: hobbit.Llama) -> None:
    """The shares are the same to the pair, the KL up to rounding."""
    with llm:
        rule = Rule(0.4, 0.7, deterministic=True, per_token=True)
        wide = Sample(window=96, limit=288, width=16)
        a, b = (rows(llm, rule, sample=sample)[1] for sample in (SAMPLE, wide))
        assert (a.high, a.low, a.skipped) == pytest.approx((b.high, b.low, b.skipped), abs=0.01)
        assert a.kl == pytest.approx(b.kl, rel=0.1)


def test_calibration(llm: hobbit.Llama, paths: tuple[Path, Path]) -> None:
    high, low = paths
    stages: list[str] = []
    found = calibrate(
        layout_of(high),
        low,
        TEXT,
        "words",
        threads=1,
        memory="1G",
        effort=Effort(wide_tokens=288, single_tokens=192, window=96, patience=(2, 4)),
        on_progress=lambda stage, done: stages.append(stage),
    )
    source = fingerprint(open_gguf(high))
    save(found, path_of(low))
    assert load(path_of(low), source) == found
    assert len(found.points) < MAX_MEASUREMENTS
    assert (found.exact.kl, found.exact.rule, found.text) == (0, EXACT, "words")
    assert found.low_type == "q4_0" and found.tokens > 64
    assert len(found.quantiles) == 101 and 0 < found.quantiles[0] < found.quantiles[-1] < 1
    assert found.all_low.kl > 0 and found.all_low.bytes_per_token < found.exact.bytes_per_token
    # What is promised holds in a run, token by token, and takes less than exact.
    budget = found.all_low.bound * 1.5
    rule = rule_for(found, budget)
    with llm:
        exact, lossy = rows(llm, rule)
        assert 0 < lossy.kl <= budget
        assert lossy.bytes_per_token < exact.bytes_per_token
