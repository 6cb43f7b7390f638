"""Llama.set_memory: another cap for a loaded model; what is computed stays the same, to the bit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from gates import Bench, in_threads, settled
from mixed import pair

import hobbit
from hobbit.rule import Rule

ARGUMENTS = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
TOKENS = [5, 9, 2, 7, 11, 3, 8, 6, 4, 10, 12, 1]


def logits_of(llm: hobbit.Llama, tokens: list[int]) -> bytes:
    llm.eval(tokens)
    row = llm._ctx.get_logits_ith(-1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).tobytes()


def floor(llm: hobbit.Llama) -> int:
    """Return the smallest cap that works."""
    with pytest.raises(hobbit.PlanError) as refused:
        llm.set_memory("1M")
    return refused.value.needed_bytes


@pytest.fixture(scope="module")
def path(bench: Bench) -> Path:
    return bench.arch("qwen3moe")


def test_a_token_does_not_depend_on_it(path: Path) -> None:
    with hobbit.Llama(str(path), memory="2G", **ARGUMENTS) as llm:
        expected = [logits_of(llm, [token]) for token in TOKENS]
        assert llm.plan.mode == "resident-experts"
    with hobbit.Llama(str(path), memory="2G", **ARGUMENTS) as llm:
        small, everything = floor(llm), llm.plan.cache_bytes
        llm.set_memory(small)
        half = small + (everything - llm.plan.cache_bytes) // 2
        found, modes, slots = [], [], []
        for i, token in enumerate(TOKENS):
            llm.set_memory((small, half, "2G")[i % 3])
            assert llm.stats.cap_bytes == llm.plan.cap.bytes
            modes.append(llm.plan.mode)
            slots.append(sum(pool.slots for pool in llm.plan.pools))
            found.append(logits_of(llm, [token]))
            assert llm.stats.cache_bytes == llm.plan.cache_bytes
        assert found == expected
    assert modes[:3] == ["streamed", "streamed", "resident-experts"]
    assert slots[0] < slots[1] < slots[2]


def test_what_was_used_most_is_read_back(path: Path) -> None:
    with hobbit.Llama(str(path), memory="2G", **ARGUMENTS) as llm:
        logits_of(llm, TOKENS)
        llm.set_memory("1G")
        before = settled(llm)
        logits_of(llm, [1])
        assert llm.stats.minus(before).misses == 0


def test_a_refusal_changes_nothing(path: Path) -> None:
    with hobbit.Llama(str(path), memory="2G", **ARGUMENTS) as llm:
        plan, before = llm.plan, logits_of(llm, TOKENS)
        floor(llm)
        with pytest.raises(hobbit.UsageError, match="is not a size"):
            llm.set_memory("much")
        assert llm.plan is plan and llm.stats.cap_bytes == 2 << 30
        llm.reset()
        reads = llm.stats.read_bytes
        assert logits_of(llm, TOKENS) == before
        assert llm.stats.read_bytes == reads  # nothing was dropped


def test_while_another_thread_generates(path: Path) -> None:
    with hobbit.Llama(str(path), memory="2G", **ARGUMENTS) as llm:
        expected = [logits_of(llm, [token]) for token in TOKENS * 8]
        llm.reset()
        small, done = floor(llm), threading.Event()
        found: list[bytes] = []

        def generate() -> None:
            try:
                found.extend(logits_of(llm, [token]) for token in TOKENS * 8)
            finally:
                done.set()

        changes = 0

        def change() -> None:
            nonlocal changes
            while not done.is_set():
                llm.set_memory((small, "2G")[changes % 2])
                changes += 1

        in_threads(generate, change)
        assert found == expected
        assert changes > 3


def test_the_rule_stays(bench: Bench) -> None:
    path, low = pair(bench, "qwen3moe")
    rule = Rule(0.4, 1.0, deterministic=True)
    with hobbit.Llama(str(path), memory="2G", low=str(low), rule=rule, **ARGUMENTS) as llm:
        expected = logits_of(llm, TOKENS)
        llm.set_memory(floor(llm))
        llm.reset()
        before = llm.stats
        assert logits_of(llm, TOKENS) == expected
        assert llm.rule == rule
        assert llm.stats.minus(before).pairs_low > 0


def test_a_model_without_experts(bench: Bench) -> None:
    path = bench.arch("llama", n_expert=0, n_used=0)
    with hobbit.Llama(str(path), memory="2G", **ARGUMENTS) as llm:
        before = logits_of(llm, TOKENS)
        floor(llm)
        llm.set_memory("1G")
        llm.reset()
        assert (llm.plan.cap.bytes, logits_of(llm, TOKENS)) == (1 << 30, before)
