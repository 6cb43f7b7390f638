"""`hobbit simulate`: caches, policies and settings side by side, on traces written here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import hobbit as command
from traces import pseudo_trace

from hobbit.errors import UsageError
from hobbit.lab import Lab, LabOptions, compare
from hobbit.policy import BELADY, POLICIES, SIMULATED, Policy, parse_policy
from hobbit.report import lab_lines
from hobbit.rule import EXACT, Rule
from hobbit.simulate import (
    Machine,
    all_bytes,
    first,
    joined,
    n_tokens,
    pools_of,
    simulate,
    tokens_before,
    without_sequences,
)
from hobbit.trace import LAYER, SEQUENCE, Trace, read_trace
from hobbit.tune import SETTINGS, sweep, tune


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return read_trace(pseudo_trace(tmp_path / "t", tokens=120))


def reads(trace: Trace, policy: Policy, share: float, **more: Any) -> int:
    pools = pools_of(trace, int(share * all_bytes(trace)))
    return int(simulate(trace, pools, policy, **more).read_bytes.sum())


class TestSimulating:
    def test_belady_reads_least(self, trace: Trace) -> None:
        for share in (0.2, 0.5, 0.8):
            best = reads(trace, BELADY, share)
            others = {name: reads(trace, policy, share) for name, policy in POLICIES.items()}
            assert best < min(others.values()), share

    def test_belady_is_the_optimum_of_brute_force(self, tmp_path: Path) -> None:
        """One layer, one expert a token: the classic problem, by its definition."""
        trace = read_trace(pseudo_trace(tmp_path / "t", tokens=60, groups=1, n_used=1, n_expert=6))
        asked = trace.experts.tolist()
        for slots in (1, 2, 3, 5):
            cached: set[int] = set()
            misses = 0
            for i, expert in enumerate(asked):
                if expert not in cached:
                    misses += 1
                    if len(cached) == slots:
                        later = asked[i + 1 :]
                        cached.remove(max(cached, key=lambda e: [*later, e].index(e)))
                    cached.add(expert)
            found = simulate(trace, pools_of(trace, slots * 10), BELADY)
            assert found.misses.sum() == misses, slots

    def test_room_for_all_reads_each_expert_once(self, trace: Trace) -> None:
        used = len({(e.group, x) for e in trace for x in e.experts.ravel().tolist()})
        for policy in SIMULATED.values():
            found = simulate(trace, pools_of(trace, all_bytes(trace)), policy)
            assert (found.misses.sum(), found.evictions.sum()) == (used, 0)
            assert found.read_bytes.sum() == used * 9

    def test_more_memory_never_reads_more_under_lru(self, trace: Trace) -> None:
        sizes = [reads(trace, POLICIES["lru"], share) for share in np.linspace(0.1, 1, 12)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]

    def test_time_is_the_longer_of_computing_and_reading(self, trace: Trace) -> None:
        pools, lru = pools_of(trace, all_bytes(trace) // 2), POLICIES["lru"]
        found = simulate(trace, pools, lru, machine=Machine(900.0, 0.06))
        expected = np.maximum(0.06 / len(trace.groups), found.read_bytes / 900.0)
        layers = trace.kind == LAYER
        assert np.allclose(found.seconds[layers], expected[layers]) and (~layers).sum() == 1
        free = simulate(trace, pools, lru, machine=Machine(0.0, 0.06))
        assert np.isclose(free.seconds.sum(), 0.06 * 120)

    def test_a_rule_needs_what_the_trace_has(self, trace: Trace, tmp_path: Path) -> None:
        pools = pools_of(trace, all_bytes(trace))
        bare = read_trace(pseudo_trace(tmp_path / "b", tokens=5, weights=False))
        high = read_trace(pseudo_trace(tmp_path / "h", tokens=5, low_bytes=0))
        nested = replace(trace, note={**trace.note, "nested": True})
        for which, rule, words in (
            (bare, Rule(0.4, 0.9), "no gate weights"),
            (high, Rule(0.4, 0.9), "no low-precision copies"),
            (nested, EXACT, "nested copy"),
            (trace, Rule(substitute=0.5), "cannot be replayed"),
            (trace, Rule((0.5,), (0.9,) * 9), "9 values|9 layers"),
        ):
            with pytest.raises(UsageError, match=words):
                simulate(which, pools, POLICIES["lru"], rule)
        assert simulate(bare, pools, POLICIES["lru"], Rule(-1.0, 1.0)).pairs[1] > 0


class TestPredictions:
    """Those that a trace has: right ones are worth the disk's idle time."""

    def test_right_ones_hide_reads(self, tmp_path: Path) -> None:
        plain = read_trace(pseudo_trace(tmp_path / "a", tokens=80, n_expert=32))
        told = read_trace(pseudo_trace(tmp_path / "b", tokens=80, n_expert=32, predicted=True))
        machine = Machine(900.0, 0.06)
        pools = pools_of(plain, all_bytes(plain) // 2)
        without = simulate(told, pools, POLICIES["lru"], machine=machine)
        base = simulate(plain, pools, POLICIES["lru"], machine=machine)
        assert np.isclose(without.seconds.sum(), base.seconds.sum()) and without.ahead == 0
        found = simulate(told, pools, POLICIES["lru"], machine=machine, predicted=True)
        assert 0 < found.ahead_used <= found.ahead
        assert found.seconds.sum() < base.seconds.sum()
        assert found.hits.sum() + found.misses.sum() == base.hits.sum() + base.misses.sum()
        assert found.hits.sum() > base.hits.sum()
        assert found.ahead_used == found.ahead and found.ahead_wasted_bytes == 0

    def test_wrong_ones_are_given_up(self, tmp_path: Path) -> None:
        told = read_trace(pseudo_trace(tmp_path / "b", tokens=80, n_expert=32, predicted="wrong"))
        pools = pools_of(told, all_bytes(told) // 2)
        slow = simulate(told, pools, POLICIES["lru"], machine=Machine(90.0, 0.3), predicted=True)
        assert slow.ahead > 0 and slow.ahead_wasted_bytes > 0
        # What is not read to its end costs less than the whole.
        assert slow.ahead_wasted_bytes < slow.ahead * 9
        smallest = pools_of(told, 30)
        floor = simulate(told, smallest, POLICIES["lru"], machine=Machine(90, 0.3), predicted=True)
        assert floor.misses.sum() > 0  # a cache of the smallest size works

    def test_under_a_rule(self, tmp_path: Path) -> None:
        told = read_trace(pseudo_trace(tmp_path / "b", tokens=80, n_expert=32, predicted=True))
        pools = pools_of(told, all_bytes(told) // 2)
        rule = Rule(0.4, 0.8, patience=3)
        found = simulate(told, pools, POLICIES["lru"], rule, Machine(900.0, 0.3), predicted=True)
        assert found.ahead_used > 0 and found.read_low_bytes.sum() > 0


class TestTraces:
    def test_the_first_tokens(self, trace: Trace) -> None:
        assert n_tokens(trace) == 120
        part = first(trace, 50)
        assert n_tokens(part) == 50 and len(part) == 50 * len(trace.groups) + 1
        found = simulate(part, pools_of(trace, 100), POLICIES["lru"])
        whole = simulate(trace, pools_of(trace, 100), POLICIES["lru"])
        assert found.hits.tolist() == whole.hits[: len(part)].tolist()

    def test_batches_count_their_tokens(self, tmp_path: Path) -> None:
        trace = read_trace(pseudo_trace(tmp_path / "t", tokens=50, rows=5))
        assert n_tokens(trace) == 50
        assert sorted(set(tokens_before(trace).tolist())) == [*range(0, 50, 5)]
        assert n_tokens(first(trace, 12)) == 15  # whole passes

    def test_one_after_the_other(self, trace: Trace, tmp_path: Path) -> None:
        other = read_trace(pseudo_trace(tmp_path / "o", tokens=40, seed=9))
        both = joined([trace, other])
        assert n_tokens(both) == 160 and len(both) == len(trace) + 1 + len(other)
        assert (both.kind == SEQUENCE).sum() == 3
        assert [e.experts.tolist() for e in both if e.experts.size] == [
            e.experts.tolist() for e in [*trace, *other] if e.experts.size
        ]
        numbers = [e.sequence.tolist()[0] for e in both if e.experts.size]
        assert len(set(numbers)) == 2 and numbers == sorted(numbers)
        assert both[len(trace)].token.tolist() == [0]
        alone = without_sequences(both)
        lfu, pools = POLICIES["lfu"], pools_of(trace, 200)
        assert (alone.kind == SEQUENCE).sum() == 0
        assert simulate(alone, pools, lfu).misses.sum() != simulate(both, pools, lfu).misses.sum()

    def test_of_another_model(self, trace: Trace, tmp_path: Path) -> None:
        other = read_trace(pseudo_trace(tmp_path / "o", tokens=4, n_expert=12))
        with pytest.raises(UsageError, match="of another model"):
            joined([trace, other])


class TestTuning:
    def test_it_finds_the_minimum_of_a_bowl(self) -> None:
        def cost(p: Policy) -> float:
            return (np.log2(p.half_life) - 6) ** 2 + (p.w_fld - 0.4) ** 2

        best, least = tune(POLICIES["decay"], cost)
        assert (best.half_life, best.w_fld, least) == (64, 0.4, 0)

    def test_it_never_gets_worse(self, trace: Trace) -> None:
        lab = Lab(LabOptions((trace.path,)))
        for name in SETTINGS:
            best, ratio = lab.tuned(POLICIES[name], ["30%"])
            pools = lab.pools("30%")
            lru = lab.read_bytes(POLICIES["lru"], pools)
            assert ratio == lab.read_bytes(best, pools) / lru
            assert ratio <= lab.read_bytes(POLICIES[name], pools) / lru
            assert parse_policy(str(best)) == best

    def test_what_has_no_settings_stays(self) -> None:
        assert tune(POLICIES["lru"], lambda p: 3.0) == (POLICIES["lru"], 3.0)

    def test_a_sweep_is_every_combination(self) -> None:
        found = sweep([POLICIES["decay"], POLICIES["lru"]], {"half_life": [2, 4], "w_fld": [0, 1]})
        assert [str(p) for p in found] == [
            "decay:w_fld=0,half_life=2", "decay:w_fld=1,half_life=2",
            "decay:w_fld=0,half_life=4", "decay:w_fld=1,half_life=4", "lru",
        ]  # fmt: skip
        with pytest.raises(UsageError, match="setting of decay"):
            sweep([POLICIES["lru"]], {"half_life": [2]})


class TestLab:
    def test_rows(self, trace: Trace) -> None:
        lab = Lab(LabOptions((trace.path,), skip=20))
        rows = {row.policy: row for row in compare(lab, [*SIMULATED.values()], ["40%"])}
        assert rows["lru"].against_lru == 1 and rows["lru"].closed == 0
        assert rows["belady"].closed == 1 and rows["belady"].against_lru < 1
        for row in rows.values():
            assert row.tokens == 100 and row.hits + row.misses == 100 * 4 * 2
            assert row.tok_s <= row.roofline_tok_s * (1 + 1e-9)
            assert row.read_bytes == row.misses * 9
        assert len({len(line) for line in lab_lines([*rows.values()])}) == 1

    def test_budgets(self, trace: Trace) -> None:
        lab = Lab(LabOptions((trace.path,)))
        slots = {text: lab.pools(text)[0].slots for text in ("50%", "20 slots", "320", "1G")}
        assert slots == {"50%": 32, "20 slots": 20, "320": 32, "1G": 64}
        for text in ("0%", "x%", "101%", "x", "1 slots"):
            with pytest.raises(UsageError):
                lab.pools(text)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"predict": "gate"}, "--predict gate"),
            ({"tune": True, "sweep": ("w_fld=1",)}, "one of the two"),
            ({"tune": True, "policy": ("lru",)}, "only decay and hobbit"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            LabOptions((Path("t"),), **options)

    def test_notes(self, trace: Trace, tmp_path: Path) -> None:
        lab = Lab(LabOptions((trace.path,)))
        assert [*lab.notes(compare(lab, [BELADY], ["50%"]))] == []
        lab.trace = replace(trace, note={**trace.note, "cached": 7, "low_is_resident": True})
        crowded = Lab(LabOptions((pseudo_trace(tmp_path / "b", tokens=40, rows=20),)))
        notes = [*lab.notes([]), *crowded.notes(compare(crowded, [BELADY], ["4 slots"]))]
        assert ["7 copies" in notes[0], "low copies" in notes[1], "layers" in notes[2]] == [
            True
        ] * 3


class TestCommand:
    def test_a_table(self, trace: Trace) -> None:
        done = command("simulate", str(trace.path), "--budget", "50%", "--skip", "10")
        assert (done.returncode, done.stderr) == (0, "pseudo: 110 tokens, 640 B of experts\n")
        lines = done.stdout.splitlines()
        assert lines[0].split()[:3] == ["cache", "policy", "hit"]
        assert [line.split()[4] for line in lines[1:]] == [*SIMULATED]

    def test_json_and_a_picture(self, trace: Trace, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        arguments = ["--json", "--policy", "lru", "--plot", str(tmp_path / "x.png")]
        done = command("simulate", str(trace.path), *arguments)
        found = json.loads(done.stdout)
        assert found["schema"] == "hobbit.simulate/1" and len(found["rows"]) == 3
        assert found["rows"][0]["closed"] == 0
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"

    def test_tuning_and_sweeping(self, trace: Trace) -> None:
        done = command("simulate", str(trace.path), "--tune", "--budget", "40%")
        assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["--policy"] * 2
        done = command("simulate", str(trace.path), "--sweep", "half_life=8,16", "--budget", "40%")
        assert len(done.stdout.splitlines()) == 3 and "half_life=16" in done.stdout

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--policy", "mru"],
            ["--policy", "lru:x=1"],
            ["--budget", "3%"],
            ["--budget", "many"],
            ["--sweep", "half_life"],
            ["--sweep", "depth=1"],
            ["--sweep", "half_life=1,,x"],
            ["--predict", "recorded"],
            ["--skip", "120"],
            ["--disk", "fast"],
            ["--t1", "0.9", "--t2", "0.5"],
        ],
        ids=" ".join,
    )
    def test_refusals(self, arguments: list[str], trace: Trace) -> None:
        done = command("simulate", str(trace.path), *arguments)
        assert done.returncode == UsageError.exit_code and not done.stdout
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
