"""The simulator counts what the engine counts, event for event, where nothing but order decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gates import Bench, layout_of, opened
from mixed import low_of, pair

import hobbit
from hobbit.forced import Forced
from hobbit.policy import POLICIES, Policy
from hobbit.rule import EXACT, Rule
from hobbit.simulate import (
    Simulated,
    pools_of,
    simulate,
)
from hobbit.stats import Stats
from hobbit.stock import Job
from hobbit.trace import SEQUENCE, Trace, read_trace

JOB = Job(n_prompt=64, n_decode=64, n_ubatch=16, n_threads=1)
TOKENS = [*range(40, 75), *range(50, 80)]
COUNTED = ("hits", "misses", "evictions", "read_bytes", "read_low_bytes", "promotions", "stand_ins")


def text_of(llm: hobbit.Llama, dest: Path, tokens: list[int], width: int = 1) -> Stats:
    """Feed tokens to a model from an empty cache, so many at once, in two sequences; trace it."""
    llm.forget()
    before = llm.stats
    with llm.traced(dest):
        for part in (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]):
            llm.reset()
            for at in range(0, len(part), width):
                llm.eval(part[at : at + width])
    return llm.stats.minus(before)


def assert_agree(found: Simulated, stats: Stats, what: object) -> None:
    sums = {n: int(np.sum(getattr(found, n))) for n in COUNTED}
    assert sums == {n: getattr(stats, n) for n in COUNTED}, what
    assert found.pairs == (stats.pairs_high, stats.pairs_low, stats.pairs_skip), what


def replayed(trace: Trace, size: int, policy: Policy, rule: Rule = EXACT) -> Simulated:
    return simulate(trace, pools_of(trace, size), policy, rule)


class TestAgreement:
    @pytest.mark.parametrize("arch", ["qwen3moe", "granitemoe", "deepseek2"])
    @pytest.mark.parametrize("name", POLICIES)
    def test_exact(self, name: str, arch: str, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch(arch, n_expert=16, n_used=3)
        for cache in ("half", "floor"):
            with opened(path, cache, JOB, policy=name, predict="none") as llm:
                stats, size = text_of(llm, tmp_path / "t", TOKENS), llm.plan.cache_bytes
            assert stats.evictions > 0
            trace = read_trace(tmp_path / "t")
            assert (trace.kind == SEQUENCE).sum() == 2
            assert_agree(replayed(trace, size, POLICIES[name]), stats, size)

    @pytest.mark.parametrize(
        "rule",
        [
            Rule(0.4, 1.0),
            Rule(0.35, 0.75, deterministic=True),
            Rule(0.5, 0.9, patience=3),
            Rule(1.0, 1.0, patience=2),
            Rule(0.3, 0.8, deterministic=True, per_token=True),
            Rule(1.0, 1.0, experts=2),
            Rule(0.3, 0.8, reversed=True),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", POLICIES)
    def test_with_a_rule(self, name: str, rule: Rule, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe", n_used=4)
        size = int(0.55 * layout_of(path).expert_bytes)
        low = str(low_of(bench, path, "q4_0"))
        with opened(path, size, JOB, policy=name, predict="none", low=low, rule=rule) as llm:
            assert not llm.plan.low_is_resident
            stats = text_of(llm, tmp_path / "t", TOKENS)
        assert stats.evictions > 0 and stats.pairs_low + stats.pairs_skip > 0
        assert_agree(replayed(read_trace(tmp_path / "t"), size, POLICIES[name], rule), stats, rule)

    @pytest.mark.parametrize("name", POLICIES)
    def test_several_pools(self, name: str, bench: Bench, tmp_path: Path) -> None:
        path, low = pair(bench, "layers-differ")
        rule = Rule(0.3, 0.9, patience=2)
        size = int(0.6 * layout_of(path).expert_bytes)
        with opened(path, size, JOB, policy=name, predict="none", low=str(low), rule=rule) as llm:
            stats = text_of(llm, tmp_path / "t", TOKENS)
        trace = read_trace(tmp_path / "t")
        assert len(trace.pools) > 1
        assert_agree(replayed(trace, size, POLICIES[name], rule), stats, name)

    @pytest.mark.parametrize("name", POLICIES)
    def test_batches_that_fit(self, name: str, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe", n_expert=16, n_used=2)
        size = int(0.55 * layout_of(path).expert_bytes)
        job = replace(JOB, n_ubatch=5)
        with opened(path, size, job, policy=name, predict="none") as llm:
            stats = text_of(llm, tmp_path / "t", TOKENS, width=10)
        trace = read_trace(tmp_path / "t")
        found = replayed(trace, size, POLICIES[name])
        assert trace.n_rows.max() == 5 and found.crowded == 0 and stats.evictions > 0
        assert_agree(found, stats, name)

    def test_batches_that_do_not_fit_are_reported(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe", n_expert=16, n_used=2)
        with opened(path, "floor", JOB, policy="lru", predict="none") as llm:
            stats = text_of(llm, tmp_path / "t", TOKENS, width=10)
            size = llm.plan.cache_bytes
        found = replayed(read_trace(tmp_path / "t"), size, POLICIES["lru"])
        assert found.crowded > 0
        # The look-ups are the same whatever arrives first, and what is missing is read.
        assert found.hits.sum() + found.misses.sum() == stats.hits + stats.misses

    def test_any_cache_can_be_simulated_from_one_trace(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("olmoe", n_expert=16, n_used=4)
        layout = layout_of(path)
        with opened(path, "all", JOB, predict="none") as llm:
            text_of(llm, tmp_path / "all", TOKENS)
        trace = read_trace(tmp_path / "all")
        for policy in (Policy("decay", w_fld=0.5, half_life=4), POLICIES["lcu"]):
            for share in (0.3, 0.7):
                size = int(share * layout.expert_bytes)
                with opened(path, size, JOB, policy=policy, predict="none") as llm:
                    stats = text_of(llm, tmp_path / "t", TOKENS)
                assert_agree(replayed(trace, size, policy), stats, share)

    def test_emptying_the_cache(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe")
        low, rule = str(low_of(bench, path, "q4_0")), Rule(0.5, 0.9, patience=3)
        size = int(0.6 * layout_of(path).expert_bytes)
        with opened(path, size, JOB, policy="lfu", predict="none", low=low, rule=rule) as llm:
            model = Forced(llm)
            llm.forget()
            before = llm.stats
            with llm.traced(tmp_path / "t"):
                for part in (TOKENS[:20], TOKENS[20:]):
                    for token in part:
                        model.decode([token])
                    llm.forget()
            stats = llm.stats.minus(before)
        assert_agree(replayed(read_trace(tmp_path / "t"), size, POLICIES["lfu"], rule), stats, "")
