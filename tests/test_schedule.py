"""Recording which precision each expert gets, and replaying it at another cache size."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gates import Bench, assert_same, layout_of, run
from mixed import HIGH, LOW, MIXED, SKIP, low_of, mixed, n_pairs, pair, steps_of

import hobbit
from hobbit.errors import HobbitError, ModelError, ReadError, UsageError
from hobbit.rule import EXACT, Rule
from hobbit.schedule import read_note
from hobbit.stock import Logits

RULE = Rule(0.35, 0.75)


@pytest.fixture(scope="module")
def recording(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Logits]:
    """An adaptive run with half of the experts cached."""
    path = tmp_path_factory.mktemp("recorded") / "schedule"
    with mixed(pair(bench, "qwen3moe"), "half", rule=RULE) as llm, llm.recorded(path):
        return path, run(llm, MIXED)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {}) for name in ("qwen3moe", "deepseek2", "k-mix", "layers-differ")),
        ("qwen3moe", {"renormalise": True}),
        ("qwen3moe", {"patience": 3}),
    ],
)
def test_a_replay_is_the_recorded_run(
    name: str, change: dict[str, int], bench: Bench, tmp_path: Path
) -> None:
    paths, rule, schedule = pair(bench, name), replace(RULE, **change), tmp_path / "schedule"
    adaptive: dict[str, Logits] = {}
    for cache in ("floor", "half"):
        with mixed(paths, cache, rule=rule) as llm:
            with llm.recorded(schedule):
                adaptive[cache] = run(llm, MIXED)
            counts = llm.stats.pairs_high, llm.stats.pairs_low, llm.stats.pairs_skip
            # It ended with the block: what follows is not in it.
            size = schedule.stat().st_size
            run(llm, replace(MIXED, seed=3))
            assert schedule.stat().st_size == size
        for other in ("floor", "all"):
            with mixed(paths, other, rule=rule, io="buffered", io_threads=1) as llm:
                run(llm, replace(MIXED, seed=5))
                before = llm.stats
                with llm.replayed(schedule):
                    assert_same(adaptive[cache], run(llm, MIXED), f"{cache} replayed at {other}")
                since = llm.stats.minus(before)
                assert (since.pairs_high, since.pairs_low, since.pairs_skip) == counts
                # Afterwards the rule decides again, by this cache.
                if other != cache:
                    assert run(llm, MIXED).tobytes() != adaptive[cache].tobytes()
    assert adaptive["floor"].tobytes() != adaptive["half"].tobytes(), "nothing is adaptive here"


def test_what_a_schedule_holds(bench: Bench, recording: tuple[Path, Logits]) -> None:
    path, _ = recording
    steps = steps_of(path)
    ubatches = -(-MIXED.n_prompt // MIXED.n_ubatch) + MIXED.n_decode
    assert [group for group, _ in steps] == [0, 1, 2] * ubatches
    assert {p for _, experts in steps for _, p in experts} == {HIGH, LOW, SKIP}
    decoded = [experts for _, experts in steps[-3 * MIXED.n_decode :]]
    assert all(len(experts) == 4 for experts in decoded)
    note = read_note(path)
    assert (note["n_batch"], note["n_ubatch"], note["renormalise"]) == (40, 16, False)
    assert len(note["model"]) == len(note["low"]) == 64


def test_exact_can_be_recorded_too(bench: Bench, tmp_path: Path) -> None:
    paths = pair(bench, "qwen3moe")
    with mixed(paths, "floor") as llm, llm.recorded(tmp_path / "schedule"):
        assert_same(bench.stock(paths[0], MIXED), run(llm, MIXED))
    assert {p for _, experts in steps_of(tmp_path / "schedule") for _, p in experts} == {HIGH}
    with mixed(paths, "half", rule=RULE) as llm, llm.replayed(tmp_path / "schedule"):
        assert_same(bench.stock(paths[0], MIXED), run(llm, MIXED))
        assert llm.stats.pairs_high == n_pairs(paths[0])


def test_resident_low_copies_are_replayed_without_them(bench: Bench, tmp_path: Path) -> None:
    path = bench.arch("qwen3moe", n_expert=32, n_used=4)
    paths, schedule = (path, low_of(bench, path, "q4_0")), tmp_path / "schedule"
    size = layout_of(path).expert_bytes * 8 // 10
    with mixed(paths, size, rule=RULE, resident_low="on") as llm, llm.recorded(schedule):
        expected = run(llm, MIXED)
        assert llm.stats.stand_ins > 0
    with mixed(paths, "floor", rule=RULE) as llm, llm.replayed(schedule):
        assert_same(expected, run(llm, MIXED))


class TestDepartures:
    """Each is one clear error, after which the model works."""

    def check(
        self,
        bench: Bench,
        schedule: Path,
        error: type[HobbitError],
        words: str,
        act: Callable[[hobbit.Llama], object] = lambda llm: run(llm, MIXED),
    ) -> None:
        paths = pair(bench, "qwen3moe")
        with mixed(paths, "floor", rule=RULE) as llm:
            with (
                pytest.raises(error) as refused,
                llm.replayed(schedule),
                llm.translated_errors(),
            ):
                act(llm)
            assert words in str(refused.value)
            assert "\n" not in str(refused.value)
            llm.rule = EXACT
            assert_same(bench.stock(paths[0], MIXED), run(llm, MIXED), "afterwards")

    def test_another_prompt(self, bench: Bench, recording: tuple[Path, Logits]) -> None:
        words = "the run departs from the replayed precision schedule: the prompt, the seed, the "
        other = replace(MIXED, seed=1)
        self.check(bench, recording[0], ReadError, words, lambda llm: run(llm, other))

    def test_other_batches(self, bench: Bench, recording: tuple[Path, Logits]) -> None:
        words = "the run departs from the replayed precision schedule"
        other = replace(MIXED, n_prompt=17)
        self.check(bench, recording[0], ReadError, words, lambda llm: run(llm, other))

    def test_a_shorter_recording(self, bench: Bench, recording: tuple[Path, Logits]) -> None:
        def act(llm: hobbit.Llama) -> None:
            run(llm, MIXED)
            run(llm, MIXED)

        words = "the replayed precision schedule ends here: it is of a shorter run"
        self.check(bench, recording[0], ReadError, words, act)

    @pytest.mark.parametrize("cut", [1, 100, 101, 102, 103])
    def test_a_truncated_file(
        self, cut: int, bench: Bench, recording: tuple[Path, Logits], tmp_path: Path
    ) -> None:
        schedule = tmp_path / "cut"
        schedule.write_bytes(recording[0].read_bytes()[:-cut])
        self.check(bench, schedule, ReadError, "the replayed precision schedule")

    @pytest.mark.parametrize("kept", [0, 4, 10, 40])
    def test_a_truncated_head(
        self, kept: int, bench: Bench, recording: tuple[Path, Logits], tmp_path: Path
    ) -> None:
        schedule = tmp_path / "cut"
        schedule.write_bytes(recording[0].read_bytes()[:kept])
        self.check(bench, schedule, ModelError, "cut: is not a precision schedule, as --record")

    @pytest.mark.parametrize(
        "data",
        [
            b"not a schedule at all",
            bytes(1000),
            b"HBSCHED1\xff\xff\xff\xffxx",
            b"HBSCHED1\x02\0\0\0[]",
            b"HBSCHED1\x03\0\0\0\xff\xfe{",
        ],
    )
    def test_garbage(self, data: bytes, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "bad").write_bytes(data)
        self.check(bench, tmp_path / "bad", ModelError, "bad: is not a precision schedule")

    def test_garbage_behind_the_head(
        self, bench: Bench, recording: tuple[Path, Logits], tmp_path: Path
    ) -> None:
        data = recording[0].read_bytes()
        head = 12 + int.from_bytes(data[8:12], "little")
        for body in (b"\xff" * 2000, b"\x80" * 2000, os.urandom(2000)):
            (tmp_path / "bad").write_bytes(data[:head] + body)
            self.check(bench, tmp_path / "bad", ReadError, "precision schedule")

    def test_no_such_file(self, bench: Bench, tmp_path: Path) -> None:
        words = f"cannot read {tmp_path / 'none'}: No such file or directory"
        self.check(bench, tmp_path / "none", UsageError, words)
        self.check(bench, tmp_path, UsageError, f"cannot read {tmp_path}: Is a directory")

    def test_another_model(self, bench: Bench, tmp_path: Path) -> None:
        schedule = tmp_path / "schedule"
        with mixed(pair(bench, "olmoe"), "floor", rule=RULE) as llm, llm.recorded(schedule):
            run(llm, MIXED)
        self.check(bench, tmp_path / "schedule", ModelError, "was recorded with model ")

    def test_another_low_copy(self, bench: Bench, tmp_path: Path) -> None:
        path, _ = pair(bench, "qwen3moe")
        paths, schedule = (path, low_of(bench, path, "q5_0")), tmp_path / "schedule"
        with mixed(paths, "floor", rule=RULE) as llm, llm.recorded(schedule):
            run(llm, MIXED)
        self.check(bench, tmp_path / "schedule", ModelError, "was recorded with low ")

    @pytest.mark.parametrize("change", [{"n_ubatch": 8}, {"n_prompt": 48}])
    def test_another_batch_size(
        self, change: dict[str, int], bench: Bench, recording: tuple[Path, Logits]
    ) -> None:
        job, paths = replace(MIXED, **change), pair(bench, "qwen3moe")
        name = "n_ubatch 16, this run has 8" if "n_ubatch" in change else "n_batch 40, this run"
        with mixed(paths, "floor", job, rule=RULE) as llm:
            with (
                pytest.raises(ModelError, match=f"schedule: was recorded with {name}"),
                llm.replayed(recording[0]),
            ):
                pass
            run(llm, job)

    def test_other_renormalisation(self, bench: Bench, recording: tuple[Path, Logits]) -> None:
        rule = replace(RULE, renormalise=True)
        with (
            mixed(pair(bench, "qwen3moe"), "floor", rule=rule) as llm,
            pytest.raises(ModelError, match="with renormalise False, this run has True"),
            llm.replayed(recording[0]),
        ):
            pass

    def test_a_path_that_cannot_be_written(self, bench: Bench, tmp_path: Path) -> None:
        paths = pair(bench, "qwen3moe")
        with mixed(paths, "floor") as llm:
            for path in (tmp_path / "none" / "x", tmp_path):
                with pytest.raises(HobbitError) as refused, llm.recorded(path):
                    pass
                assert str(path) in str(refused.value)
                assert "\n" not in str(refused.value)
            assert_same(bench.stock(paths[0], MIXED), run(llm, MIXED))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, bench: Bench) -> None:
        paths = pair(bench, "qwen3moe")
        with mixed(paths, "floor") as llm:
            with (
                pytest.raises(HobbitError, match=f"written: {os.strerror(errno.ENOSPC)}"),
                llm.recorded(Path("/dev/full")),
                llm.translated_errors(),
            ):
                for _ in range(8):
                    run(llm, MIXED)
            assert_same(bench.stock(paths[0], MIXED), run(llm, MIXED))

    def test_a_long_note(
        self, bench: Bench, recording: tuple[Path, Logits], tmp_path: Path
    ) -> None:
        """What a later version says more does not matter."""
        data = recording[0].read_bytes()
        head = 12 + int.from_bytes(data[8:12], "little")
        note = json.dumps(json.loads(data[12:head]) | {"more": "x" * 5000}).encode()
        schedule = tmp_path / "longer"
        schedule.write_bytes(data[:8] + len(note).to_bytes(4, "little") + note + data[head:])
        with mixed(pair(bench, "qwen3moe"), "all", rule=RULE) as llm, llm.replayed(schedule):
            assert_same(recording[1], run(llm, MIXED))
