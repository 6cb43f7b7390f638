from __future__ import annotations

import json

import pytest

from hobbit.stats import Stats

RUN = Stats(
    tokens_prompt=10,
    tokens_generated=30,
    prompt_s=2.0,
    decode_s=6.0,
    ttft_s=2.5,
    hits=300,
    misses=100,
    read_bytes=80 << 20,
    stall_s=2.0,
    moe_s=5.0,
    io="direct",
    cap_bytes=1000,
    peak_bytes=900,
    cache_bytes=500,
    mode="streamed",
)


def test_rates() -> None:
    assert RUN.hit_rate == 0.75
    assert RUN.mib_per_token == 2
    assert RUN.tok_s == 5
    assert RUN.prompt_tok_s == 5
    assert RUN.stall_share == 0.25


def test_predictions() -> None:
    run = Stats(
        tokens_prompt=10, tokens_generated=30, predicted=50, predicted_right=41,
        ahead_bytes=80 << 20, ahead_wasted_bytes=20 << 20, predictor="gate",
    )  # fmt: skip
    assert (run.prediction_accuracy, run.ahead_mib_per_token) == (0.82, 2)
    assert run.ahead_wasted_share == 0.25
    # What was read before is given up now.
    later = run.minus(Stats(ahead_bytes=70 << 20))
    assert (later.ahead_wasted_share, later.predictor) == (1, "gate")
    assert Stats().prediction_accuracy == Stats().ahead_wasted_share == 0


def test_nothing_happened() -> None:
    empty = Stats()
    assert (empty.hit_rate, empty.mib_per_token, empty.tok_s) == (1, 0, 0)
    assert (empty.prompt_tok_s, empty.stall_share) == (0, 0)


def test_minus_keeps_what_is_not_counted() -> None:
    later = Stats(tokens_generated=40, decode_s=8.0, read_bytes=90 << 20, peak_bytes=950, io="x")
    since = later.minus(Stats(tokens_generated=30, decode_s=6.0, read_bytes=80 << 20))
    assert (since.tokens_generated, since.decode_s, since.read_bytes) == (10, 2, 10 << 20)
    assert (since.peak_bytes, since.io) == (950, "x")


def test_to_dict() -> None:
    data = json.loads(json.dumps(RUN.to_dict()))
    assert data["hits"] == 300
    assert data["hit_rate"] == pytest.approx(0.75)
    assert data["prediction_accuracy"] == 0
    assert data["mode"] == "streamed"
