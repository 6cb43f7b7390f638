"""Predictions are about time alone: with every predictor, hobbit's logits are stock's, bit for bit.

Also what is kept of the expert maps between runs, in a cache folder of the test's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from gates import Bench, assert_same, layout_of, opened, run

import hobbit
from hobbit.errors import UsageError
from hobbit.fingerprint import fingerprint
from hobbit.prediction import Prediction, parse_prediction

# A softmax; a sigmoid and a bias of choice; a softmax of those that were chosen; more layers; and
# some whose routers are not understood or get another input than the experts.
KNOWN = ["qwen3moe", "minimax-m2", "gpt-oss", "jamba"]
UNKNOWN = ["deepseek2", "gemma4", "llama4"]
PREDICTORS = ["gate:always", "map:always", "map:always,depth=4,maps=3", "none"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("predict", PREDICTORS)
@pytest.mark.parametrize("arch", KNOWN + UNKNOWN)
def test_exact(arch: str, predict: str, bench: Bench) -> None:
    path = bench.arch(arch)
    for cache in ("floor", "half"):
        with opened(path, cache, predict=predict) as llama:
            assert_same(bench.stock(path), run(llama), f"{arch}, {predict}, cache {cache}")
            stats = llama.stats
        assert stats.evictions > 0
        assert (stats.predicted > 0) == (arch in KNOWN and predict != "none")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def decode(llama: hobbit.Llama, n: int) -> float:
    """Decode some tokens; return the share of predictions of them that were right."""
    before = llama.stats
    for token in range(1, n + 1):
        llama.eval([token])
    after = llama.stats
    return (after.predicted_right - before.predicted_right) / (after.predicted - before.predicted)


def test_what_repeats_is_predicted(bench: Bench) -> None:
    with opened(bench.arch("qwen3moe"), "half", predict="map:always") as llama:
        first = decode(llama, 24)
        llama.reset()
        assert first < 0.7 < 0.95 < decode(llama, 24)


class TestKept:
    """The expert maps of a run are those that the next one begins with."""

    PREDICT = "map:always,maps=64"

    def test_the_next_run_knows_the_tokens(self, bench: Bench, folder: Path) -> None:
        path = bench.arch("qwen3moe")
        found = []
        for _ in range(2):
            with opened(path, "half", predict=self.PREDICT, warm_start=True) as llama:
                found.append(decode(llama, 24))
        assert found[0] < 0.7 < 0.95 < found[1]
        name = fingerprint(layout_of(path).gguf)[:32]
        assert files(folder) == [f"{name}.json", f"{name}.maps"]

    @pytest.mark.parametrize("damage", ["cut", "changed", "another", "size"])
    def test_what_cannot_be_used_is_replaced(self, damage: str, bench: Bench, folder: Path) -> None:
        path = bench.arch("qwen3moe")
        with opened(path, "half", predict=self.PREDICT, warm_start=True) as llama:
            decode(llama, 24)
        (kept,) = folder.rglob("*.maps")
        before, sound = kept.read_bytes(), {}
        if damage == "cut":
            kept.write_bytes(before[:-9])
        elif damage == "changed":
            kept.write_bytes(before[:-200] + bytes([before[-200] ^ 1]) + before[-199:])
        elif damage == "another":
            kept.write_bytes(before[:8] + bytes(32) + before[40:])
        predict = "map:always,maps=65" if damage == "size" else self.PREDICT
        for n in range(2):
            with opened(path, "half", predict=predict, warm_start=True) as llama:
                sound[n] = decode(llama, 24)
        assert sound[0] < 0.7 < 0.95 < sound[1]

    def test_a_run_without_new_maps_changes_nothing(self, bench: Bench, folder: Path) -> None:
        path = bench.arch("qwen3moe")
        with opened(path, "half", predict=self.PREDICT, warm_start=True) as llama:
            decode(llama, 24)
        (kept,) = folder.rglob("*.maps")
        before = kept.stat()  # but for when it was read
        for predict in ("none", "gate:always", "map:maps=65"):
            with opened(path, "half", predict=predict, warm_start=True) as llama:
                llama.eval([*range(1, 20)])  # a prompt has no maps
        after = kept.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_off_without_a_warm_start(self, bench: Bench, folder: Path) -> None:
        with opened(bench.arch("qwen3moe"), "half", predict=self.PREDICT) as llama:
            decode(llama, 8)
        assert not folder.exists()

    def test_a_folder_that_cannot_be_written(self, bench: Bench, folder: Path) -> None:
        path = bench.arch("qwen3moe")
        folder.write_text("not a folder")
        with opened(path, "half", predict=self.PREDICT, warm_start=True) as llama:
            decode(llama, 8)
        folder.unlink()
        (folder / "usage" / f"{fingerprint(layout_of(path).gguf)[:32]}.maps").mkdir(parents=True)
        with opened(path, "half", predict=self.PREDICT, warm_start=True) as llama:
            decode(llama, 8)
        assert [name for name in files(folder) if "part" in name] == []


class TestMemory:
    def test_the_plan_counts_the_maps(self, bench: Bench) -> None:
        path, scratch = bench.arch("qwen3moe"), {}
        for predict in ("none", "map", "map:maps=5000", "auto", "auto:maps=9"):
            with opened(path, "half", predict=predict) as llama:
                lines = {line.name: line.bytes for line in llama.plan.lines}
                scratch[predict] = lines["scratch"]
        # A map of this model: a hint of 128 numbers, and 3 layers of 8.
        grown = scratch["map:maps=5000"] - scratch["map"]
        assert grown == pytest.approx((5000 - 1024) * 2 * (128 + 3 * 8 + 20), rel=0.1)
        assert scratch["none"] < scratch["auto"] < scratch["auto:maps=9"]
        assert scratch["none"] < scratch["map"]


class TestSettings:
    def test_how_many_maps(self) -> None:
        assert parse_prediction("map").map_capacity == 1024
        assert parse_prediction("auto").map_capacity == 0
        assert parse_prediction("gate").map_capacity == 0
        assert parse_prediction("auto:maps=7").map_capacity == 7
        assert str(parse_prediction("map:maps=7,depth=3")) == "map:depth=3,maps=7"
        assert str(Prediction("map")) == "map"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("map:maps=0", "maps=1 to maps=99999"),
            ("map:maps=100000", "maps=1 to maps=99999"),
            ("map:maps", "no setting 'maps'"),
            ("gate:maps=5", "gate keeps no expert maps"),
            ("none:maps=5", "none keeps no expert maps"),
        ],
    )
    def test_wrong_ones_are_refused(self, text: str, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            parse_prediction(text)
