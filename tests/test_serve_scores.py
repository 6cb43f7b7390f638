"""Log-probabilities from the server are those of stock llama.cpp's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny
from gates import Bench
from mixed import pair
from serving import Server, loopback_only, served

from hobbit.stock import Job

no_network = loopback_only  # in place of the one in conftest

JOB = Job(n_prompt=80, n_decode=1, n_ubatch=32, n_threads=1)
SMALL = ("-c", "512", "-ub", "32", "-b", "96")


def prompt_of() -> list[int]:
    return [int(token) for token in JOB.tokens(tiny.N_VOCAB)[0, : JOB.n_prompt]]


def scores(server: Server, **more: Any) -> Any:
    """Ask as lm-eval does."""
    asked = {"prompt": prompt_of(), "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    reply = server.ask("/v1/completions", asked | more)
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["logprobs"]


def test_scores_of_a_prompt_are_stocks_bit_for_bit(bench: Bench) -> None:
    path = bench.arch("olmoe")
    rows = bench.stock(path, JOB)[:, 0]
    expected = llama_cpp.Llama.logits_to_logprobs(rows)
    prompt = prompt_of()
    with served(path, *SMALL) as server:
        found = scores(server)
        again = scores(server)
        without_echo = scores(server, echo=False)
    assert len(found["tokens"]) == len(prompt) + 1
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    told = np.array(found["token_logprobs"][1:-1], dtype=np.float32)
    right = np.array([expected[i, t] for i, t in enumerate(prompt[1:])], dtype=np.float32)
    assert told.tobytes() == right.tobytes()
    best = np.array([max(top.values()) for top in found["top_logprobs"][1:]], dtype=np.float32)
    assert best.tobytes() == expected[: len(prompt)].max(axis=1).tobytes()
    assert again == found
    # What comes after the prompt is the same whether its logits were asked for or not.
    assert without_echo["tokens"] == found["tokens"][-1:]
    assert without_echo["token_logprobs"] == pytest.approx(found["token_logprobs"][-1:], abs=1e-6)


def test_a_text_is_scored_from_its_first_word_on(tmp_path: Path) -> None:
    with served(tiny.make_text_model(tmp_path / "m.gguf"), *SMALL) as server:
        found = scores(server, prompt="one two three", max_tokens=0)
        tokens = server.ask("/tokenize", {"content": "one two three"}).json["tokens"]
        ends = server.ask("/tokenizer_info").json
    assert len(found["tokens"]) == len(tokens) and all(found["tokens"])
    assert "bos_token" in ends and "eos_token" in ends


def test_a_request_may_ask_for_exact_and_for_nothing_worse(bench: Bench) -> None:
    path, low = pair(bench, "olmoe")
    with served(path, *SMALL) as exact:
        right = scores(exact)
        assert exact.ask("/hobbit/plan").json["quality"] == "exact"
    flags = ("--low-file", str(low), "--t1", "0", "--t2", "1", "--deterministic")
    with served(path, *SMALL, *flags) as lossy:
        own = scores(lossy)
        asked = scores(lossy, hobbit={"quality": "exact"})
        after = scores(lossy)
        refused = lossy.ask("/v1/completions", {"prompt": "x", "hobbit": {"quality": "high"}})
    assert own["token_logprobs"] != right["token_logprobs"]
    assert asked == right
    assert after == own
    assert refused.status == 400
