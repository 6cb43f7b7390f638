"""Gates on two precisions of each expert, with llama.cpp's own graphs; logits compared as bits.

Every rule that has an exact counterpart is held to it: off to plain llama.cpp, all-low to plain
llama.cpp on a file whose experts are the low ones, fewer experts to a model that uses fewer. What
else a rule decides is read from a recorded schedule.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
from gates import (
    Bench,
    assert_same,
    layout_of,
    opened,
    rss_bytes,
    run,
    settled,
    skip_without_direct,
)
from mixed import (
    HIGH,
    LOW,
    MIXED,
    MODELS,
    SINGLE,
    SKIP,
    Step,
    low_of,
    mixed,
    n_pairs,
    only_low,
    pair,
    steps_of,
)

import hobbit
from hobbit.errors import HobbitError, PlanError, UsageError
from hobbit.llama import ResidentLow
from hobbit.rule import ALL_LOW, EXACT, Rule
from hobbit.stats import Stats
from hobbit.stock import Job

SEVERAL = [name for name in MODELS if name not in ("llama", "granitemoe", "odd-size")]


def shares(stats: Stats) -> tuple[int, int, int]:
    return stats.pairs_high, stats.pairs_low, stats.pairs_skip


def recorded(llm: hobbit.Llama, rule: Rule, folder: Path, job: Job = SINGLE) -> list[Step]:
    """Run a job under a rule and return what each expert got."""
    llm.rule = rule
    with llm.recorded(folder / "schedule"):
        run(llm, job)
    return steps_of(folder / "schedule")


@pytest.mark.parametrize("name", MODELS)
def test_off_is_off(name: str, bench: Bench) -> None:
    """With T1 = T2 = 1 every routing is scored, and the logits are plain llama.cpp's."""
    paths = pair(bench, name)
    expected = bench.stock(paths[0], MIXED)
    for cache in ("floor", "all"):
        with mixed(paths, cache) as llm:
            llm.rule = Rule(1.0, 1.0)
            assert_same(expected, run(llm, MIXED), f"{name}, cache {cache}")
            stats = llm.stats
            assert stats.scored == n_pairs(paths[0])
            assert stats.unscored == 0
            assert shares(stats) == (n_pairs(paths[0]), 0, 0)
            assert stats.read_low_bytes == 0 < stats.read_bytes


@pytest.mark.parametrize("name", MODELS)
def test_full_on(name: str, bench: Bench) -> None:
    """With T1 = T2 = 0 only each token's top expert is left, and with T2 = 1 alone is high."""
    paths = pair(bench, name)
    total, top = n_pairs(paths[0], SINGLE), 41 * len(layout_of(paths[0]).groups)
    with mixed(paths, "all", SINGLE) as llm:
        llm.rule = Rule(0.0, 0.0, deterministic=True)
        run(llm, SINGLE)
        assert shares(llm.stats) == (top, 0, total - top)
        assert llm.stats.read_low_bytes == 0
        llm.rule = Rule(0.0, 1.0, deterministic=True)
        before = llm.stats
        run(llm, SINGLE)
        assert shares(llm.stats.minus(before)) == (top, total - top, 0)
        assert llm.stats.read_low_bytes > 0
        # The other way round it is the least important that stays: as many, and others.
        plain = run(llm, SINGLE)
        llm.rule = Rule(0.0, 1.0, deterministic=True, reversed=True)
        before = llm.stats
        found = run(llm, SINGLE)
        assert shares(llm.stats.minus(before)) == (top, total - top, 0)
        assert found.tobytes() != plain.tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_all_low_is_the_model_of_the_low_types(name: str, bench: Bench) -> None:
    paths = pair(bench, name)
    expected = bench.stock(only_low(bench, *paths), MIXED)
    for cache in ("floor", "half", "all"):
        with mixed(paths, cache, rule=ALL_LOW) as llm:
            assert_same(expected, run(llm, MIXED), f"{name}, cache {cache}")
            assert shares(llm.stats) == (0, n_pairs(paths[0]), 0)
            stats = settled(llm)
            assert stats.read_bytes == stats.read_low_bytes > 0
            assert_same(expected, run(llm, MIXED), f"{name}, cache {cache}, again")


def test_all_low_is_not_exact(bench: Bench) -> None:
    """So that the gates above can fail."""
    for name in MODELS:
        path, low = pair(bench, name)
        exact, lossy = bench.stock(path, MIXED), bench.stock(only_low(bench, path, low), MIXED)
        assert exact.tobytes() != lossy.tobytes(), name


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "olmoe"])
def test_fewer_experts(arch: str, bench: Bench) -> None:
    """Of 4 experts 2: as a model that uses 2, which olmoe does without scaling their weights.

    In a batch an expert is used by all its tokens or by none, unless each decides for itself.
    """
    four, two = (bench.arch(arch, n_expert=16, n_used=n) for n in (4, 2))
    fewer = Rule(experts=2, renormalise=arch != "olmoe", deterministic=True)
    for job, rule in ((SINGLE, fewer), (MIXED, replace(fewer, per_token=True))):
        expected, full = bench.stock(two, job), bench.stock(four, job)
        assert not np.allclose(expected, full, atol=0.05)
        for cache in ("floor", "all"):
            with opened(four, cache, job, rule=rule) as llm:
                found = run(llm, job)
                assert np.abs(found - expected).max() < 1e-3
                assert llm.stats.pairs_skip == llm.stats.pairs_high == n_pairs(four, job) // 2
                llm.rule = replace(rule, renormalise=not rule.renormalise)
                assert np.abs(run(llm, job) - expected).max() > 0.05


@pytest.mark.parametrize(
    "options", [{"arch": "llama4"}, {"arch": "gemma4"}, {"arch": "qwen3moe", "scales": True}]
)
def test_gate_weights_that_are_not_seen(options: dict[str, Any], bench: Bench) -> None:
    """Without scores a rule cannot be kept: an error, and not exact in silence."""
    path = bench.arch(**options)
    expected = bench.stock(path, MIXED)
    with opened(path, "floor", MIXED, rule=Rule(0.0, 0.0)) as llm:
        with (
            pytest.raises(hobbit.ReadError, match="gate weights of this model are not where"),
            llm.translated_errors(),
        ):
            run(llm, MIXED)
        assert llm.stats.unscored > 0 == llm.stats.scored
        # Where scores make no difference none is asked for.
        llm.rule = Rule(1.0, 1.0)
        assert_same(expected, run(llm, MIXED))


class TestDeterministic:
    """The need decides alone: whatever the cache's size and past, and how its reads go."""

    RULE = Rule(0.35, 0.75, deterministic=True)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            *((name, {}) for name in SEVERAL),
            *((name, {"per_token": True}) for name in ("qwen3moe", "deepseek2", "layers-differ")),
            *((name, {"renormalise": True}) for name in ("qwen3moe", "gpt-oss")),
        ],
    )
    def test_logits(self, name: str, change: dict[str, bool], bench: Bench) -> None:
        paths, rule = pair(bench, name), replace(self.RULE, **change)
        with mixed(paths, "all", rule=rule) as llm:
            expected = run(llm, MIXED)
            assert all(shares(llm.stats)), "the rule does not use all three"
            counts = shares(llm.stats)
            assert_same(expected, run(llm, MIXED), "twice in a row")
        assert expected.tobytes() != bench.stock(paths[0], MIXED).tobytes()
        for cache in ("floor", "half"):
            for io_threads in (1, 3):
                with mixed(paths, cache, io_threads=io_threads, io="buffered", rule=rule) as llm:
                    assert_same(expected, run(llm, MIXED), f"{cache}, {io_threads} threads")
                    assert shares(llm.stats) == counts
                    run(llm, replace(MIXED, seed=7))
                    assert_same(expected, run(llm, MIXED), f"{cache}, another prompt before")

    @pytest.mark.parametrize("name", ["qwen3moe", "odd-size"])
    def test_direct_reads(self, name: str, bench: Bench) -> None:
        paths = pair(bench, name)
        skip_without_direct(paths[0])
        found = []
        for io in ("direct", "buffered"):
            with mixed(paths, "floor", io=io, rule=self.RULE) as llm:
                found.append(run(llm, MIXED))
                assert llm.stats.io == io
        assert_same(*found)

    def test_sampled_text(self, bench: Bench) -> None:
        path = bench.model("words", lambda path: tiny.make_text_model(path, arch="qwen3moe"))
        paths = path, low_of(bench, path, "q4_0")
        texts: dict[bool, set[str]] = {True: set(), False: set()}
        for deterministic, found in texts.items():
            rule = replace(self.RULE, deterministic=deterministic)
            for cache in ("floor", "half", "all"):
                with mixed(paths, cache, rule=rule) as llm:
                    for prompt in ("the cat", "of the sea", "the cat"):
                        # Nothing of the last prompt is reused: batches would be other ones.
                        llm.reset()
                        answer = llm.create_completion(prompt, max_tokens=48, seed=5)
                        if prompt == "the cat":
                            found.add(answer["choices"][0]["text"])
        assert len(texts[True]) == 1
        assert len(min(texts[True])) > 40
        assert len(texts[False]) > 1, "without it nothing depends on the cache: the test is weak"

    @pytest.mark.parametrize(
        "per_token",
        [False, True],
    )
    def test_text_asked_for_again(self, per_token: bool, bench: Bench) -> None:
        """llama-cpp-python keeps what a prompt shares with the last one."""
        path = bench.model("words", lambda path: tiny.make_text_model(path, arch="qwen3moe"))
        paths, rule = (path, low_of(bench, path, "q4_0")), replace(self.RULE, per_token=per_token)
        with mixed(paths, "half", rule=rule) as llm:
            answers = [
                llm.create_completion(prompt, max_tokens=48, seed=5)["choices"][0]["text"]
                for prompt in ("the cat", "the cat", "of the sea", "the cat")
            ]
        assert len({answers[0], answers[1], answers[3]}) == 1

    def test_without_it_the_cache_decides(self, bench: Bench) -> None:
        rule, found = replace(self.RULE, deterministic=False), {}
        for cache in ("floor", "all"):
            with mixed(pair(bench, "qwen3moe"), cache, rule=rule) as llm:
                found[cache] = run(llm, MIXED)
        assert found["floor"].tobytes() != found["all"].tobytes()


class TestAdaptive:
    """What is cached in the higher precision is used in it."""

    @pytest.mark.parametrize("name", ["qwen3moe", "olmoe", "k-mix", "layers-differ"])
    def test_warm_and_high_is_exact(self, name: str, bench: Bench) -> None:
        paths = pair(bench, name)
        expected = bench.stock(paths[0], MIXED)
        with mixed(paths, "all") as llm:
            run(llm, MIXED)
            read = llm.stats.read_bytes
            for rule in (Rule(0.0, 0.0), Rule(0.3, 0.6), Rule(-1.0, 1.0)):
                llm.rule = rule
                assert_same(expected, run(llm, MIXED), f"{name}, {rule}")
            assert llm.stats.read_bytes == read
            assert llm.stats.pairs_skip == llm.stats.pairs_low == 0
            # Everything forgotten, the same rule is far from exact.
            llm.forget()
            assert run(llm, MIXED).tobytes() != expected.tobytes()

    def test_cold_only_what_is_needed_is_read(self, bench: Bench, tmp_path: Path) -> None:
        """Each copy is read once, and a low copy that was promoted goes."""
        paths = pair(bench, "qwen3moe")
        layout = layout_of(paths[0])
        high = {g.index: g.expert_bytes for g in layout.groups}
        with mixed(paths, "all", SINGLE) as llm:
            assert llm.layout.low is not None
            low = {g.index: g.expert_bytes for g in llm.layout.low.groups}
            steps = recorded(llm, Rule(0.3, 0.9), tmp_path)
            stats = llm.stats
        got: dict[tuple[int, int], list[int]] = {}
        for group, experts in steps:
            for expert, precision in experts:
                got.setdefault((group, expert), []).append(precision)
        reads = Counter()
        for (group, _), precisions in got.items():
            used = [p for p in precisions if p != SKIP]
            # Never lower than it was cached.
            assert used == sorted(used, reverse=True)
            assert SKIP not in precisions[precisions.index(used[0]) :] if used else True
            reads[HIGH] += (HIGH in used) * high[group]
            reads[LOW] += (LOW in used) * low[group]
        assert stats.read_low_bytes == reads[LOW] > 0
        assert stats.read_bytes == reads[HIGH] + reads[LOW]
        promoted = sum({LOW, HIGH} <= {*precisions} for precisions in got.values())
        assert stats.promotions == promoted > 0
        assert stats.evictions == 0

    def test_a_cache_for_all_fills_with_high(self, bench: Bench) -> None:
        """In the end: while low copies are there, promotions evict a few."""
        paths = pair(bench, "qwen3moe")
        with mixed(paths, "all", SINGLE, rule=Rule(1.0, 1.0, patience=2)) as llm:
            for seed in range(6):
                run(llm, replace(SINGLE, seed=seed))
            before = llm.stats
            for seed in range(6):
                run(llm, replace(SINGLE, seed=seed))
            stats = llm.stats.minus(before)
            assert (stats.evictions, stats.pairs_low) == (0, 0)

    def test_at_the_floor_nothing_breaks(self, bench: Bench) -> None:
        for name in MODELS:
            with mixed(pair(bench, name), "floor", rule=Rule(0.3, 0.7)) as llm:
                found = run(llm, MIXED)
                assert np.isfinite(found).all()
                assert llm.stats.evictions > 0
                assert sum(shares(llm.stats)) == n_pairs(pair(bench, name)[0])
                # And back: a rule is in force from the next layer on.
                llm.rule = EXACT
                assert_same(bench.stock(pair(bench, name)[0], MIXED), run(llm, MIXED), name)


class TestPatience:
    def test_the_high_copy_comes_at_the_nth_need(self, bench: Bench, tmp_path: Path) -> None:
        # So many experts that some are never used: a promotion needs room for both copies.
        path = bench.arch("qwen3moe", n_expert=32, n_used=4)
        paths, job = (path, low_of(bench, path, "q4_0")), replace(SINGLE, n_decode=24)
        with mixed(paths, "all", job) as llm:
            for patience in (2, 3, 5):
                llm.forget()
                before = llm.stats
                steps = recorded(llm, Rule(1.0, 1.0, patience=patience), tmp_path, job)
                stats = llm.stats.minus(before)
                assert stats.evictions == 0
                seen: dict[tuple[int, int], list[int]] = {}
                for group, experts in steps:
                    for expert, precision in experts:
                        seen.setdefault((group, expert), []).append(precision)
                assert max(map(len, seen.values())) > patience
                waited = 0
                for precisions in seen.values():
                    n = min(patience - 1, len(precisions))
                    assert precisions == [LOW] * n + [HIGH] * (len(precisions) - n)
                    waited += n
                assert stats.stand_ins == stats.pairs_low == waited
                assert stats.promotions == sum(len(p) >= patience for p in seen.values())

    def test_a_patience_of_one_is_none(self, bench: Bench) -> None:
        paths = pair(bench, "qwen3moe")
        for rule in (Rule(1.0, 1.0), Rule(0.3, 0.8)):
            found = []
            for patience in (0, 1, 3):
                asked = replace(rule, patience=patience)
                # Single tokens and no reads ahead: no arrival decides what is cached.
                with mixed(paths, "half", SINGLE, rule=asked, predict="none") as llm:
                    found.append((run(llm, SINGLE).tobytes(), llm.stats.read_bytes))
            assert found[0] == found[1] != found[2]

    def test_deterministic_needs_none(self, bench: Bench) -> None:
        """The need decides alone: patience, which depends on the past, has no part in it."""
        rule = Rule(0.3, 0.8, deterministic=True)
        with mixed(pair(bench, "qwen3moe"), "half", rule=rule) as llm:
            expected = run(llm, MIXED)
            llm.rule = replace(rule, patience=4)
            assert_same(expected, run(llm, MIXED))


class TestSubstitute:
    """Cache-aware routing, which the rules are compared with."""

    WIDE: ClassVar[dict[str, int]] = {"n_expert": 16, "n_used": 4}

    def test_nothing_to_gain_is_exact(self, bench: Bench) -> None:
        """A lambda of 0, and everything cached: all logits grow alike."""
        path = bench.arch("qwen3moe", **self.WIDE)
        expected = bench.stock(path, MIXED)
        with opened(path, "floor", MIXED, rule=Rule(substitute=0.0)) as llm:
            assert_same(expected, run(llm, MIXED))
        layout = layout_of(path)
        with opened(path, "all", MIXED) as llm:
            for seed in range(40):
                run(llm, replace(MIXED, seed=seed, n_decode=1))
                if llm.stats.misses == sum(g.n_expert for g in layout.groups):
                    break
            llm.rule = Rule(substitute=1.0)
            before = llm.stats
            # Not bits: its gate weights come from a softmax of ours. Where two experts are nearly
            # equal that may change a later layer's choice, and with it every later token.
            differences = np.abs(run(llm, MIXED) - expected).max(axis=(1, 2))
            assert np.median(differences) < 1e-2
            assert llm.stats.misses == before.misses

    def test_the_top_expert_stays(self, bench: Bench, tmp_path: Path) -> None:
        """In the first layer, whose inputs no rule changes."""
        path = bench.arch("qwen3moe", **self.WIDE)

        def first(steps: list[Step]) -> list[list[tuple[int, int]]]:
            return [experts for group, experts in steps if group == 0]

        with opened(path, "half", SINGLE) as llm:
            # All but the top one are skipped.
            tops = first(recorded(llm, Rule(0.0, 0.0, deterministic=True), tmp_path))
            top = [next(e for e, p in experts if p == HIGH) for experts in tops]
        with opened(path, 10 * (layout_of(path).groups[0].expert_bytes + 24576), SINGLE) as llm:
            plain = first(recorded(llm, Rule(1.0, 1.0), tmp_path))
            misses = llm.stats.misses
            llm.forget()
            changed = first(recorded(llm, Rule(substitute=1.0), tmp_path))
            assert llm.stats.misses - misses < misses
        assert [[e for e, _ in x] for x in plain] == [[e for e, _ in x] for x in tops]
        for best, experts in zip(top, changed, strict=True):
            assert best in [e for e, _ in experts]
            assert len({e for e, _ in experts}) == 4
        assert plain != changed

    def test_a_router_that_is_not_seen_is_an_error(self, bench: Bench) -> None:
        """DeepSeek's selects by groups, from a sigmoid."""
        path = bench.arch("deepseek2")
        with opened(path, "floor", MIXED, rule=Rule(substitute=0.5)) as llm:
            with (
                pytest.raises(hobbit.ReadError, match="needs a router that is a softmax"),
                llm.translated_errors(),
            ):
                run(llm, MIXED)
            llm.rule = EXACT
            assert_same(bench.stock(path, MIXED), run(llm, MIXED))


class TestResidentLow:
    """All low copies are kept, so that nothing waits."""

    RULE = Rule(0.7, 1.0)

    @pytest.fixture
    def paths(self, bench: Bench) -> tuple[Path, Path]:
        path = bench.arch("qwen3moe", n_expert=32, n_used=4)
        return path, low_of(bench, path, "q4_0")

    def test_high_copies_come_in_the_background(self, paths: tuple[Path, Path]) -> None:
        layout, job = layout_of(paths[0]), replace(SINGLE, n_decode=60)
        size = layout.expert_bytes * 9 // 10
        with mixed(paths, size, job, rule=self.RULE, resident_low="on") as llm:
            assert llm.plan.low_is_resident
            assert llm.stats.cache_bytes == llm.plan.cache_bytes <= size
            start = llm.stats
            assert llm.layout.low is not None
            every = sum(g.expert_bytes * g.n_expert for g in llm.layout.low.groups)
            assert start.read_bytes == start.read_low_bytes == every
            run(llm, job)
            first = llm.stats.minus(start)
            assert first.stand_ins > 0 and first.promotions > 0
            before = llm.stats
            for _ in range(3):
                run(llm, job)
            later = llm.stats.minus(before)
            assert later.pairs_high / 3 > first.pairs_high
            assert llm.stats.read_low_bytes == every, "a low copy went"
            assert llm.stats.pairs_skip == 0

    @pytest.mark.parametrize("share", [0.7, 0.8, 0.9])
    def test_nothing_waits(self, share: float, paths: tuple[Path, Path]) -> None:
        job, size = replace(SINGLE, n_decode=60), int(share * layout_of(paths[0]).expert_bytes)
        with mixed(paths, size, job, rule=self.RULE, resident_low="on") as llm:
            start = llm.stats
            for seed in range(3):
                run(llm, replace(job, seed=seed))
            stats = llm.stats.minus(start)
            assert (stats.misses, stats.stall_s) == (0, 0)

    def test_forgetting_keeps_them(self, paths: tuple[Path, Path]) -> None:
        size = layout_of(paths[0]).expert_bytes * 8 // 10
        with mixed(paths, size, rule=self.RULE, resident_low="on") as llm:
            read = llm.stats.read_low_bytes
            llm.forget()
            run(llm, MIXED)
            assert llm.stats.read_low_bytes == read
            with pytest.raises(UsageError, match="with resident low copies nothing is exact"):
                llm.rule = EXACT

    def test_deterministic_with_them(self, paths: tuple[Path, Path]) -> None:
        rule = replace(self.RULE, deterministic=True)
        with mixed(paths, "floor", rule=rule) as llm:
            expected = run(llm, MIXED)
        size = layout_of(paths[0]).expert_bytes * 8 // 10
        with mixed(paths, size, rule=rule, resident_low="on") as llm:
            assert_same(expected, run(llm, MIXED))
            assert llm.stats.stand_ins == 0

    def test_it_is_refused(self, paths: tuple[Path, Path], bench: Bench) -> None:
        for arguments in ({}, {"low": str(paths[1])}, {"rule": Rule(1.0, 1.0)}):
            with (
                pytest.raises(UsageError, match="resident low copies are for a lossy quality"),
                opened(paths[0], "half", resident_low="on", **arguments),
            ):
                pass
        with (
            pytest.raises(PlanError, match="low copies of all experts do not fit"),
            mixed(paths, "floor", rule=self.RULE, resident_low="on"),
        ):
            pass

    def test_the_cap_that_the_refusal_names_works(self, bench: Bench) -> None:
        path = bench.arch("qwen3moe", n_expert=32, n_embd=512, n_ff=1024, n_layer=2)
        paths = path, low_of(bench, path, "q4_0")
        job = replace(MIXED, n_prompt=4, n_decode=2, n_ubatch=4)
        common = {"rule": self.RULE, "low": str(paths[1]), **job.llama_arguments()}
        with pytest.raises(PlanError) as small:
            hobbit.Llama(str(path), memory="16M", **common)
        memory = small.value.needed_bytes + (4 << 20)
        with pytest.raises(PlanError) as refused:
            hobbit.Llama(str(path), memory=memory, resident_low="on", **common)
        assert "\n" not in str(refused.value)
        typed = re.search(r"--memory (\d+M)", str(refused.value))
        assert typed is not None
        with hobbit.Llama(str(path), memory=typed[1], resident_low="on", **common) as llm:
            assert llm.plan.low_is_resident
            run(llm, job)
        with hobbit.Llama(str(path), memory=memory, resident_low="auto", **common) as llm:
            assert not llm.plan.low_is_resident


@pytest.mark.parametrize(
    ("rule", "resident"),
    [
        (Rule(0.35, 0.75), "off"),
        (Rule(0.35, 0.75, deterministic=True), "off"),
        (Rule(1.0, 1.0, patience=3), "off"),
        (Rule(0.7, 1.0), "on"),
    ],
)
def test_the_cap_holds(rule: Rule, resident: ResidentLow, bench: Bench) -> None:
    """Of 150 MB of experts, and 43 MB of low ones, 60 MB are cached, in any mixture."""
    path = bench.arch("qwen3moe", expert_type="F16", n_expert=64, n_used=4, n_embd=256, n_ff=512)
    paths, size = (path, low_of(bench, path, "q4_0")), 60 << 20
    assert layout_of(path).expert_bytes > 2 * size
    with opened(path, "floor", MIXED) as llm:  # what is imported and allocated the first time
        run(llm, MIXED)
    before = rss_bytes()
    with mixed(paths, size, rule=rule, resident_low=resident) as llm:
        for seed in range(3):
            run(llm, replace(MIXED, seed=seed))
        assert llm.stats.evictions > 0
        assert size // 2 < rss_bytes() - before < size + (24 << 20)


class TestRefusals:
    def test_a_rule_without_a_low_copy(self, bench: Bench) -> None:
        path, _ = pair(bench, "qwen3moe")
        with opened(path, "floor", MIXED) as llm:
            for rule in (ALL_LOW, Rule(0.5, 0.9), Rule(patience=3)):
                with pytest.raises(UsageError, match="needs low-precision experts"):
                    llm.rule = rule
            llm.rule = Rule(0.5, 0.5)  # skips only
            run(llm, MIXED)
            assert llm.stats.pairs_skip > 0
            llm.rule = EXACT
            assert_same(bench.stock(path, MIXED), run(llm, MIXED))

    def test_thresholds_of_another_model(self, bench: Bench) -> None:
        with mixed(pair(bench, "qwen3moe"), "floor") as llm:
            with pytest.raises(UsageError, match="for 5 layers, not for 3"):
                llm.rule = Rule((0.5,) * 5, 1.0)
            llm.rule = Rule((0.5, 0.2, 0.9), 1.0)
            run(llm, MIXED)
            assert llm.stats.pairs_low > 0

    def test_a_dense_model(self, bench: Bench) -> None:
        path = bench.arch("llama", n_expert=0, n_used=0)
        with opened(path, 0) as llm, pytest.raises(HobbitError, match="no experts that stream"):
            llm.rule = Rule(0.5, 0.5)

    def test_a_truncated_low_file(self, bench: Bench, tmp_path: Path) -> None:
        path, low = pair(bench, "qwen3moe")
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(low.read_bytes()[:-5000])
        with pytest.raises(hobbit.ModelError, match=r"cut\.gguf.*truncated"):
            hobbit.Llama(str(path), low=str(cut), cache_bytes="floor")

    def test_a_low_file_that_shrinks_while_in_use(self, bench: Bench, tmp_path: Path) -> None:
        path, low = pair(bench, "qwen3moe")
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(low.read_bytes())
        with mixed((path, copy), "floor", rule=ALL_LOW) as llm:
            os.truncate(copy, 50_000)
            with (
                pytest.raises(hobbit.ReadError, match=r"copy\.gguf at offset \d+ failed"),
                llm.translated_errors(),
            ):
                run(llm, MIXED)
            llm.rule = EXACT
            assert_same(bench.stock(path, MIXED), run(llm, MIXED))
            copy.write_bytes(low.read_bytes())
            llm.rule = ALL_LOW
            assert_same(bench.stock(only_low(bench, path, low), MIXED), run(llm, MIXED))


def test_one_threshold_a_layer(bench: Bench, tmp_path: Path) -> None:
    with mixed(pair(bench, "qwen3moe"), "all", SINGLE) as llm:
        rule = Rule((1.0, -1.0, 0.0), (1.0, 1.0, 0.0), deterministic=True)
        got = Counter()
        for group, experts in recorded(llm, rule, tmp_path):
            got.update((group, precision) for _, precision in experts)
    assert got == {(0, HIGH): 164, (1, LOW): 164, (2, HIGH): 41, (2, SKIP): 123}


def test_logits_move_with_the_dial(bench: Bench) -> None:
    """The more pairs are low, the further from exact; and the top one matters most."""
    paths = pair(bench, "qwen3moe")
    exact = bench.stock(paths[0], SINGLE)

    def distance(rule: Rule) -> float:
        with mixed(paths, "floor", SINGLE, rule=rule) as llm:
            return float(np.square(run(llm, SINGLE) - exact).mean())

    far = [distance(Rule(t1, 1.0, deterministic=True)) for t1 in (1.0, 0.8, 0.5, 0.0, -1.0)]
    assert far[0] == 0
    assert far == sorted(far)
    assert far[4] - far[3] > far[3] - far[2]
