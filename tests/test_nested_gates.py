"""Gates on nested copies: exact is plain llama.cpp on the source, all-low is the model of Q4_1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from gates import Bench, assert_same, layout_of, opened, run, settled, skip_without_direct
from mixed import MIXED, SINGLE, n_pairs, only_low

import hobbit
from hobbit.errors import UsageError
from hobbit.nested import make_nested
from hobbit.rule import ALL_LOW, EXACT, Rule

MODELS = {
    "qwen3moe": {"arch": "qwen3moe", "n_used": 4},
    "deepseek2": {"arch": "deepseek2", "n_expert": 16, "n_used": 4},
    "gpt-oss": {"arch": "gpt-oss", "n_used": 4},
    "fused": {"arch": "qwen3moe", "fused": True},
    "odd-size": {"arch": "olmoe", "n_embd": 96, "n_ff": 160, "n_head": 3, "n_used": 3},
    "top-1": {"arch": "llama", "n_used": 1},
    # Experts of several read blocks.
    "large": {
        "arch": "qwen3moe", "n_embd": 2048, "n_ff": 2048, "n_layer": 1, "n_expert": 4, "n_used": 1,
    },
}  # fmt: skip
DETERMINISTIC = Rule(0.35, 0.75, deterministic=True)


def nested_of(bench: Bench, name: str) -> tuple[Path, Path]:
    """Return a Q8_0 model and its nested copy."""
    path = bench.arch(**MODELS[name])
    copy = bench.model(f"{name}-nested", lambda dest: make_nested(layout_of(path), dest))
    return path, copy


def plane_bytes(copy: Path) -> tuple[list[int], list[int]]:
    """Return of each group the bytes of an expert's low copy, and of what completes it."""
    layout = layout_of(copy)
    assert layout.low is not None
    low = [g.expert_bytes for g in layout.low.groups]
    return low, [sum(m.plane_bytes for m in g.matrices) for g in layout.groups]


@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str, bench: Bench) -> None:
    path, copy = nested_of(bench, name)
    expected = bench.stock(path, MIXED)
    for cache in ("floor", "half", "all"):
        with opened(copy, cache, MIXED) as llm:
            assert llm.stats.read_bytes == 0, "loading read expert bytes"
            assert_same(expected, run(llm, MIXED), f"{name}, cache {cache}")
            stats = llm.stats
            assert stats.pairs_high == n_pairs(path)
            assert stats.pairs_low == 0 < stats.read_bytes
            # A high copy's own planes are no low copy's bytes.
            assert stats.read_low_bytes == 0
            if cache != "all":
                assert stats.evictions > 0


@pytest.mark.parametrize("rule", [EXACT, DETERMINISTIC, Rule(0.35, 0.75)])
@pytest.mark.parametrize("cache", ["floor", "half", "all"])
def test_a_warm_start(
    rule: Rule, cache: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """High copies that nobody asked for come with their low ones, and are in nobody's way."""
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path))
    path, copy = nested_of(bench, "qwen3moe")
    found = []
    for _ in range(3):
        with opened(copy, cache, MIXED, rule=rule, warm_start=True) as llm:
            found.append(run(llm, MIXED))
    if rule.deterministic:
        assert_same(found[0], found[2], f"warm, cache {cache}")
    elif rule.is_exact:
        assert_same(bench.stock(path, MIXED), found[2], f"warm, cache {cache}")


def test_everything_cached_is_read_once(bench: Bench) -> None:
    """With room for all it settles: then nothing is read or evicted."""
    _, copy = nested_of(bench, "qwen3moe")
    with opened(copy, "all", MIXED) as llm:
        assert llm.plan.mode == "resident-experts"
        for seed in range(4):
            run(llm, replace(MIXED, seed=seed))
        # While several are read at a time, their low planes may take an expert's place.
        again = llm.stats.misses - sum(g.n_expert for g in layout_of(copy).groups)
        assert 0 <= again == llm.stats.evictions <= 2
        read = llm.stats.read_bytes
        run(llm, MIXED)
        assert llm.stats.read_bytes == read, "a warm full cache read again"


@pytest.mark.parametrize("name", MODELS)
def test_all_low(name: str, bench: Bench) -> None:
    path, copy = nested_of(bench, name)
    expected = bench.stock(only_low(bench, path, copy), MIXED)
    assert expected.tobytes() != bench.stock(path, MIXED).tobytes()
    for cache in ("floor", "half", "all"):
        with opened(copy, cache, MIXED, rule=ALL_LOW) as llm:
            assert_same(expected, run(llm, MIXED), f"{name}, cache {cache}")
            assert llm.stats.pairs_low == n_pairs(path)
            stats = settled(llm)
            assert stats.read_bytes == stats.read_low_bytes > 0


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2", "odd-size"])
def test_deterministic(name: str, bench: Bench) -> None:
    _, copy = nested_of(bench, name)
    with opened(copy, "all", MIXED, rule=DETERMINISTIC) as llm:
        expected = run(llm, MIXED)
        counts = llm.stats.pairs_high, llm.stats.pairs_low, llm.stats.pairs_skip
        assert all(counts)
    for cache in ("floor", "half"):
        for io in ("buffered", "auto"):
            with opened(copy, cache, MIXED, rule=DETERMINISTIC, io=io, io_threads=1) as llm:
                run(llm, replace(MIXED, seed=5))
                before = llm.stats
                assert_same(expected, run(llm, MIXED), f"{name}, cache {cache}, {io}")
                since = llm.stats.minus(before)
                assert (since.pairs_high, since.pairs_low, since.pairs_skip) == counts


def test_a_promotion_reads_one_plane(bench: Bench) -> None:
    _, copy = nested_of(bench, "qwen3moe")
    (low, *_), (plane, *_) = plane_bytes(copy)
    assert (low, plane) == (3 * 128 * 128 * 20 // 32, 3 * 128 * 128 * 16 // 32)
    with opened(copy, "all", SINGLE, rule=ALL_LOW) as llm:
        run(llm, SINGLE)
        first = llm.stats
        assert first.read_bytes == first.misses * low
        llm.rule = EXACT
        run(llm, SINGLE)
        since = llm.stats.minus(first)
        # Of experts that were low only what was missing; of others both planes.
        fresh = since.misses - since.promotions
        assert since.promotions > 0
        assert since.read_bytes == since.misses * plane + fresh * low


def test_adaptive_rules_and_patience(bench: Bench) -> None:
    path, copy = nested_of(bench, "qwen3moe")
    for cache in ("floor", "half", "all"):
        for rule in (Rule(0.35, 0.75), Rule(1.0, 1.0, patience=3), Rule(0.5, 1.0, patience=2)):
            with opened(copy, cache, MIXED, rule=rule) as llm:
                run(llm, MIXED)
                assert llm.stats.pairs_low > 0 and llm.stats.pairs_high > 0
                llm.rule = EXACT
                assert_same(bench.stock(path, MIXED), run(llm, MIXED), f"{cache}, {rule}")


def test_a_recording_is_replayed(bench: Bench, tmp_path: Path) -> None:
    _, copy = nested_of(bench, "qwen3moe")
    rule = Rule(0.35, 0.75)
    with opened(copy, "half", MIXED, rule=rule) as llm, llm.recorded(tmp_path / "schedule"):
        expected = run(llm, MIXED)
    for cache in ("floor", "all"):
        with opened(copy, cache, MIXED, rule=rule) as llm, llm.replayed(tmp_path / "schedule"):
            assert_same(expected, run(llm, MIXED), cache)


def test_resident_low(bench: Bench) -> None:
    path = bench.arch("qwen3moe", n_expert=32, n_used=4)
    copy = bench.model("wide-nested", lambda dest: make_nested(layout_of(path), dest))
    size, rule = layout_of(copy).expert_bytes, Rule(0.7, 1.0)
    with opened(copy, size * 9 // 10, SINGLE, rule=rule, resident_low="on") as llm:
        every = llm.stats.read_low_bytes
        assert every == size * 20 // 34
        for seed in range(3):
            run(llm, replace(SINGLE, seed=seed))
        stats = llm.stats
        assert stats.promotions > 0 < stats.stand_ins
        assert stats.pairs_high > 0
        assert stats.read_low_bytes == every
        # One plane each, those under way not yet whole.
        assert 0 < stats.read_bytes - every <= stats.promotions * plane_bytes(copy)[1][0]


def test_the_floor(bench: Bench) -> None:
    """Of one expert the low copy and what it becomes: room for both, where one would do else."""
    path, copy = nested_of(bench, "top-1")
    slots = {}
    for name, file in (("plain", path), ("nested", copy)):
        with opened(file, "floor", MIXED) as llm:
            (pool,) = llm.plan.pools
            slots[name] = pool.slots, pool.extra > 0
            assert_same(bench.stock(path, MIXED), run(llm, MIXED), name)
    assert slots == {"plain": (1, False), "nested": (1, True)}


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_io(io: str, bench: Bench) -> None:
    for name in ("qwen3moe", "odd-size", "large"):
        path, copy = nested_of(bench, name)
        if io == "direct":
            skip_without_direct(copy)
        with opened(copy, "floor", MIXED, io=io, io_threads=3) as llm:
            assert_same(bench.stock(path, MIXED), run(llm, MIXED), name)
            assert llm.stats.io == io


def test_parts(bench: Bench) -> None:
    path, copy = nested_of(bench, "qwen3moe")
    first = tiny.split(copy, 3)
    assert len(layout_of(first).gguf.parts) == 3
    for cache in ("floor", "all"):
        with opened(first, cache, MIXED) as llm:
            assert_same(bench.stock(path, MIXED), run(llm, MIXED), cache)
            llm.rule = ALL_LOW
            lossy = bench.stock(only_low(bench, path, copy), MIXED)
            assert_same(lossy, run(llm, MIXED), cache)


def test_a_file_that_shrinks_while_in_use(bench: Bench, tmp_path: Path) -> None:
    path, copy = nested_of(bench, "qwen3moe")
    file = tmp_path / "model.gguf"
    whole = copy.read_bytes()
    file.write_bytes(whole)
    layout = layout_of(copy)
    assert layout.low is not None
    # In the middle layer: of one matrix a plane is there, of another none.
    for group in (layout.groups[1], layout.low.groups[1]):
        for rule in (EXACT, Rule(0.5, 1.0)):
            with opened(file, "floor", MIXED, rule=rule) as llm:
                with file.open("r+b") as shrunk:
                    shrunk.truncate(group.matrices[1].offset + 1000)
                for _ in range(3):
                    with (
                        pytest.raises(hobbit.ReadError, match=r"model\.gguf at offset \d+ failed"),
                        llm.translated_errors(),
                    ):
                        run(llm, MIXED)
                with file.open("r+b") as shrunk:
                    shrunk.write(whole)
                llm.rule = EXACT
                assert_same(bench.stock(path, MIXED), run(llm, MIXED))


def test_another_low_copy_is_refused(bench: Bench) -> None:
    path, copy = nested_of(bench, "qwen3moe")
    with pytest.raises(UsageError, match="a nested copy has its low-precision experts in itself"):
        hobbit.Llama(str(copy), low=str(path), cache_bytes="floor")
