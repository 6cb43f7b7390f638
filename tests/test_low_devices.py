"""Low copies on a device too: the same logits wherever a copy is, and slots by what is used more.

The device is that of test_devices.py: ggml's RPC server in another process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from gates import Bench, assert_same, layout_of, opened, run, settled
from mixed import MIXED, mixed, pair
from servers import Server, running
from test_devices import info, there
from test_nested_gates import nested_of

from hobbit.arena import Arena, plan_arena
from hobbit.calibration import Point
from hobbit.errors import PlanError
from hobbit.layout import Layout, LowCopies
from hobbit.mix import ALL_HIGH, Mix, mix_for, needs
from hobbit.nested import make_nested
from hobbit.quality import Quality
from hobbit.rule import ALL_LOW, EXACT, Rule

DETERMINISTIC = Rule(0.3, 0.8, deterministic=True)
BATCH = 256 << 10


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def rss_of(server: Server) -> int:
    """Return the anonymous memory of its process: not the libraries that it maps."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("name", ["qwen3moe", "k-mix", "layers-differ", "gpt-oss", "fused"])
def test_low_copies_are_used_there(name: str, bench: Bench, server: Server) -> None:
    """By a rule that decides alone; warm, and with the smallest cache here."""
    paths = pair(bench, name)
    with mixed(paths, "floor", rule=DETERMINISTIC) as llm:
        expected = run(llm, MIXED)
    with mixed(paths, "floor", rule=DETERMINISTIC, **there(server, paths[0])) as llm:
        for when in ("cold", "warm"):
            assert_same(expected, run(llm, MIXED), f"{name}, {when}")
        stats = settled(llm)
        assert stats.pairs_skip > 0
        assert stats.pairs_low > stats.device_low_pairs > 0
        assert stats.pairs_high > stats.device_pairs - stats.device_low_pairs > 0
        assert llm.plan.device is not None
        assert " in low precision, in its own memory" in llm.plan.device.reason


@pytest.mark.parametrize("records_there", [True, False])
@pytest.mark.parametrize("name", ["qwen3moe", "fused"])
def test_replay(
    name: str, records_there: bool, bench: Bench, server: Server, tmp_path: Path
) -> None:
    """What was cached, here or there, decided: the same decisions give the same logits."""
    paths, rule, found = pair(bench, name), Rule(0.0, 1.0), []
    for k, is_there in enumerate((records_there, not records_there)):
        with contextlib.ExitStack() as stack:
            arguments = there(server, paths[0], 0.3) if is_there else {}
            llm = stack.enter_context(mixed(paths, "floor", rule=rule, **arguments))
            schedule = llm.replayed if k else llm.recorded
            with schedule(tmp_path / "schedule"):
                found += [run(llm, MIXED), run(llm, MIXED)]
            if is_there:
                assert llm.stats.device_low_pairs > 0
                assert llm.stats.device_pairs > llm.stats.device_low_pairs
    for first, second in zip(found[:2], found[2:], strict=True):
        assert_same(first, second, name)


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_nested(name: str, bench: Bench, server: Server, tmp_path: Path) -> None:
    """What goes there is the finished copy, not the plane that makes it one."""
    path, copy = nested_of(bench, name)
    arguments = there(server, path)
    with opened(copy, "floor", MIXED, rule=DETERMINISTIC) as llm:
        expected = run(llm, MIXED)
    with opened(copy, "floor", MIXED, rule=DETERMINISTIC, **arguments) as llm:
        assert_same(expected, run(llm, MIXED), name)
        assert_same(expected, run(llm, MIXED), f"{name}, warm")
        stats = llm.stats
        assert stats.device_pairs > stats.device_low_pairs > 0
    with opened(copy, "half", MIXED, rule=Rule(0.0, 1.0), **arguments) as llm:
        with llm.recorded(tmp_path / "schedule"):
            promoted = [run(llm, MIXED), run(llm, MIXED)]
        assert llm.stats.device_low_pairs > 0
    with (
        opened(copy, "half", MIXED, rule=Rule(0.0, 1.0)) as llm,
        llm.replayed(tmp_path / "schedule"),
    ):
        for found in promoted:
            assert_same(found, run(llm, MIXED), f"{name}, promoted")
    with opened(copy, "floor", MIXED, **arguments) as llm:
        assert_same(bench.stock(path, MIXED), run(llm, MIXED), f"{name}, exact")
        assert llm.stats.device_pairs > llm.stats.device_low_pairs == 0


def test_what_is_there_costs_nothing(bench: Bench, server: Server) -> None:
    """A low copy there is used for what would be skipped; nothing is read or predicted for it."""
    paths = pair(bench, "qwen3moe")
    rule, skip = Rule(-1.0, 1.0), Rule(-1.0, -1.0)
    arguments = there(server, paths[0], 1.0, predict="gate:always")
    with mixed(paths, "floor", rule=rule, **arguments) as llm:
        for _ in range(3):
            run(llm, MIXED)
        before = settled(llm)
        run(llm, MIXED)
        since = llm.stats.minus(before)
        assert since.device_low_pairs == since.pairs_low > 0
        assert since.read_bytes == since.ahead == since.device_bytes == 0
        llm.rule = skip
        before = settled(llm)
        run(llm, MIXED)
        since = llm.stats.minus(before)
        assert since.device_low_pairs == since.pairs_low > 0
        assert since.read_bytes == 0


def test_high_alone_has_no_low_slots(bench: Bench, server: Server) -> None:
    paths = pair(bench, "qwen3moe")
    arguments = there(server, paths[0])
    for more in ({"quality": "exact"}, {"rule": Rule(0.9, 0.9, deterministic=True)}):
        with opened(paths[0], "floor", MIXED, **more, **arguments) as llm:
            run(llm, MIXED)
            assert llm.stats.device_pairs > llm.stats.device_low_pairs == 0
            assert llm.plan.device is not None
            assert "low precision" not in llm.plan.device.reason


def test_device_memory_stays_within_its_cap(bench: Bench) -> None:
    """Of a process that has nothing else: experts of 13 MB, and low copies of 8."""
    sizes = {"n_embd": 2048, "n_ff": 2048, "n_layer": 1, "n_expert": 4, "n_used": 2}
    path = bench.arch("qwen3moe", **sizes)
    copy = bench.model("large-nested", lambda dest: make_nested(layout_of(path), dest))
    vram = 44 << 20
    with running() as server:
        before = rss_of(server)
        arguments = {"device": server.device, "vram": vram, "upload": "1G", "dispatch": "split"}
        with opened(copy, "all", MIXED, rule=DETERMINISTIC, **arguments) as llm:
            run(llm, MIXED)
            stats = settled(llm)
            grown = rss_of(server) - before
            assert llm.plan.device is not None
            assert llm.plan.device.bytes <= vram
            assert stats.device_pairs > stats.device_low_pairs > 0
            # What a computation needs besides is the backend's own: work buffers.
            assert llm.plan.device.bytes - (2 << 20) < grown < vram + (6 << 20)


# --- the division ---


def with_low(bench: Bench, name: str) -> Layout:
    path, low = pair(bench, name)
    layout, copies = layout_of(path), layout_of(low)
    return replace(layout, low=LowCopies(copies.gguf, copies.groups))


def divided(layout: Layout, vram: int, mix: Mix) -> Arena:
    return plan_arena(layout, info(), vram, BATCH, 0, mix)


def slots(arena: Arena) -> tuple[int, int]:
    return sum(p.slots for p in arena.pools), sum(p.low_slots for p in arena.pools)


MIXES = [ALL_HIGH, Mix(0.3), Mix(0.8), Mix(0.5, True), Mix(0.1, True), Mix(1.0, True)]


@pytest.mark.parametrize("name", ["qwen3moe", "k-mix", "layers-differ"])
@pytest.mark.parametrize("mix", MIXES)
def test_arena(name: str, mix: Mix, bench: Bench) -> None:
    """Whatever there is room for: within it, without waste, and more of both when it grows."""
    layout = with_low(bench, name)
    assert layout.low is not None
    groups, low_groups = layout.groups, layout.low.groups
    experts, largest = sum(g.n_expert for g in groups), max(g.expert_bytes for g in groups)
    with pytest.raises(PlanError) as refused:
        divided(layout, 4096, mix)
    assert refused.value.needed_bytes is not None
    least = divided(layout, refused.value.needed_bytes, mix)
    assert min(pool.slots for pool in least.pools) == 1
    everything = layout.expert_bytes + sum(g.expert_bytes * g.n_expert for g in low_groups)
    found = []
    for step in range(1, 61):
        vram = least.bytes + everything * step // 50
        arena = divided(layout, vram, mix)
        high, low = slots(arena)
        found.append((high, low))
        assert arena.bytes <= vram
        assert high <= experts
        assert low <= (experts if mix.beside else experts - high)
        is_full = high == experts and low == (experts if mix.low and mix.beside else 0)
        assert is_full or vram - arena.bytes <= len(arena.pools) * largest
    assert found[-1] == (experts, experts if mix.low and mix.beside else 0)
    highs = [high for high, _ in found]
    assert all(after >= before - len(groups) for before, after in pairwise(highs))
    high, low = found[len(found) // 4]
    assert abs(low / (high + low) - mix.low) < 0.15 or (not mix.beside and high + low == experts)


def point(high: float, low: float) -> Point:
    return Point(EXACT, 0.1, 0.1, 0.0, 0.2, 1e6, high, low, 1 - high - low)


def test_mix(bench: Bench) -> None:
    layout = with_low(bench, "qwen3moe")  # 4 of its experts are used; Q8_0 and Q4_0
    smaller = 18 / 34

    def mix(rule: Rule, of: Point | None = None) -> Mix:
        return mix_for(layout, Quality("", rule, layout.low, of))

    assert mix(EXACT) == mix(Rule(0.5, 0.5)) == ALL_HIGH
    assert mix_for(replace(layout, low=None), Quality("", ALL_LOW)) == ALL_HIGH
    assert mix(ALL_LOW) == Mix(1.0, beside=True)
    assert mix(Rule(-1.0, 1.0)) == Mix(1.0, beside=True)
    assert mix(DETERMINISTIC) == Mix(0.5, beside=True)
    assert mix(DETERMINISTIC, point(0.2, 0.6)) == Mix(pytest.approx(0.75), beside=True)
    assert mix(Rule(0.3, 1.0)).low == 0.0  # half of the pairs need high
    per_high = 3 * (1 - smaller) - 1
    assert mix(Rule(0.0, 1.0)).low == pytest.approx(per_high / (1 + per_high))
    assert not mix(Rule(0.0, 1.0)).beside
    assert mix(Rule(0.3, 1.0), point(0.1, 0.9)).low > mix(Rule(0.0, 1.0)).low
    assert mix(Rule(1.0, 1.0, patience=2), point(1.0, 0.0)).low == 0.0


def test_needs(bench: Bench) -> None:
    layout = with_low(bench, "qwen3moe")
    n = len(layout.groups)
    assert needs(Rule(0.0, 0.5), layout) == (0.25, 0.5)
    assert needs(Rule(-1.0, 1.0), layout) == (0.0, 1.0)
    assert needs(Rule((1.0,) * n, (1.0,) * n), layout) == (1.0, 0.0)
    high, low = needs(Rule((0.0,) + (1.0,) * (n - 1), 1.0), layout)
    assert high + low == pytest.approx(1.0)
    assert low == pytest.approx(0.75 / n)
