"""What earlier runs used: how it is kept, and what a warm start makes of it."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from gates import Bench, assert_same, in_threads, layout_of, opened, run, thread_count

import hobbit
from hobbit import usage
from hobbit.fingerprint import fingerprint
from hobbit.gguf_file import GGUF
from hobbit.planning.feedback import expected
from hobbit.verify import cache_bytes

NAME = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(bench: Bench) -> Path:
    return bench.arch("qwen3moe")


def kept(folder: Path) -> list[Path]:
    """Return the files, but for expert maps: those are tested with the predictors."""
    return sorted(path for path in folder.glob("usage/*") if path.suffix != ".maps")


def settled(llama: hobbit.Llama) -> Any:
    """Wait until nothing more is read ahead; return the counters."""
    streamed = llama._streamed
    assert streamed is not None and streamed._warming is not None
    streamed._warming.join(30)
    assert not streamed._warming.is_alive()
    return streamed.counters()


class TestFile:
    def test_uses_decay(self, folder: Path) -> None:
        assert usage.load(NAME, 3) == [0, 0, 0]
        assert usage.save(NAME, [8, 0, 1])
        assert usage.load(NAME, 3) == [8, 0, 1]
        for _ in range(usage.HALF_LIFE_RUNS):
            usage.save(NAME, [0, 10, 0])
        after = usage.load(NAME, 3)
        assert after[0] == pytest.approx(4, abs=0.01)
        assert after[2] == pytest.approx(0.5, abs=0.01)
        assert 30 < after[1] < 40
        assert [p.name for p in kept(folder)] == [f"{NAME[:32]}.json"]

    def test_a_run_that_used_nothing_changes_nothing(self, folder: Path) -> None:
        usage.save(NAME, [4, 2])
        before = kept(folder)[0].read_bytes()
        assert not usage.save(NAME, [0, 0])
        assert kept(folder)[0].read_bytes() == before

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"model": "another"},
            {"uses": [1]},
            {"uses": None},
            {"uses": [1, "2"]},
            {"uses": [1, -2]},
            {"uses": [1, float("nan")]},
            {"uses": [1, 10**400]},
        ],
    )
    def test_what_does_not_fit_is_ignored(self, folder: Path, change: dict[str, Any]) -> None:
        usage.save(NAME, [4, 2])
        (file,) = kept(folder)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert usage.load(NAME, 2) == [0, 0]
        assert usage.save(NAME, [1, 1])
        assert usage.load(NAME, 2) == [1, 1]

    def test_the_most_used_come_first(self) -> None:
        assert usage.order([1, 0, 5, 5, 0.5], everything=False) == [2, 3, 0, 4]
        assert usage.order([1, 0, 5, 5, 0.5], everything=True) == [2, 3, 0, 4, 1]


class TestWarmStart:
    def test_off_by_default(self, path: Path, folder: Path) -> None:
        with opened(path, "half") as llama:
            run(llama)
        assert not folder.exists()

    @pytest.mark.parametrize("cache", ["floor", "layer", "half", "all"])
    def test_exact_and_remembered(self, bench: Bench, path: Path, folder: Path, cache: str) -> None:
        threads = thread_count()
        for n in range(3):
            with opened(path, cache, warm_start=True) as llama:
                assert_same(bench.stock(path), run(llama), f"run {n}")
                assert llama._streamed is not None
                counts, stats = llama._streamed.usage(), llama.stats
            assert sum(counts) == stats.hits + stats.misses
            assert len(kept(folder)) == 1
        assert thread_count() == threads
        assert usage.load(fingerprint(layout_of(path).gguf), len(counts))

    def test_the_fingerprint_is_worked_out_once(
        self, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[object] = []

        def counted(gguf: GGUF) -> str:
            asked.append(gguf)
            return fingerprint(gguf)

        monkeypatch.setattr("hobbit.llama.fingerprint", counted)
        with opened(path, "half", warm_start=True) as llama:
            llama.eval([1])
            expected(llama)
            assert llama.fingerprint == fingerprint(llama.layout.gguf)
        assert len(asked) == 1

    def test_what_was_used_is_there(self, path: Path, folder: Path) -> None:
        with opened(path, "half", warm_start=True) as llama:
            assert settled(llama).n_cached == 0  # the first run knows nothing
            run(llama)
            cold = llama.stats
        with opened(path, "half", warm_start=True) as llama:
            counters = settled(llama)
            assert counters.n_cached == counters.n_slots > 0
            assert counters.hits == counters.misses == counters.evictions == 0
            streamed = llama._streamed
            assert streamed is not None
            uses = usage.load(fingerprint(llama.layout.gguf), len(streamed.usage()))
            llama.eval([1])
            assert llama.stats.hits > 0
        assert cold.misses > 0
        assert max(uses) > min(uses)

    def test_everything_is_read_where_everything_fits(self, path: Path) -> None:
        with opened(path, "all", warm_start=True) as llama:
            counters = settled(llama)
            assert counters.n_cached == counters.n_slots
            run(llama)
            assert llama.stats.misses == 0

    def test_nothing_is_evicted_for_it(self, path: Path) -> None:
        with opened(path, "half", warm_start=True) as llama:
            run(llama)
        with opened(path, "half", warm_start=True) as llama:
            llama.forget()
            settled(llama)
            assert llama.stats.evictions == 0

    def test_a_folder_that_cannot_be_written(self, path: Path, folder: Path) -> None:
        folder.write_text("not a folder")
        with opened(path, "half", warm_start=True) as llama:
            run(llama)

    @pytest.mark.parametrize("cache", ["floor", "half"])
    def test_reads_ahead_that_fill_the_cache_while_it_computes(
        self, bench: Bench, path: Path, cache: str
    ) -> None:
        with opened(path, cache) as llama:
            streamed, done = llama._streamed, threading.Event()
            assert streamed is not None
            numbers = [*range(len(streamed.usage()))]

            def disturb() -> None:
                for seed in itertools.count():
                    random.Random(seed).shuffle(numbers)
                    llama.forget()
                    streamed.warm(numbers)
                    if done.wait(0.0005):
                        break

            def compute() -> None:
                try:
                    assert_same(bench.stock(path), run(llama))
                finally:
                    done.set()

            in_threads(disturb, compute)

    def test_a_close_right_after_the_load(self, path: Path) -> None:
        with opened(path, "all", warm_start=True):
            pass
        start = time.monotonic()
        with opened(path, "all", warm_start=True) as llama:
            began = time.monotonic()
            llama.close()
            assert time.monotonic() - began < 1 + (began - start)

    def test_a_program_that_ends_without_closing(self, path: Path) -> None:
        """The thread that reads ahead neither keeps the process nor crashes it."""
        size = cache_bytes(layout_of(path), "all")
        code = (
            "import hobbit\n"
            f"llm = hobbit.Llama({str(path)!r}, cache_bytes={size}, n_threads=1, warm_start=True)\n"
            "lib = hobbit.streamed.lib\n"
            "hobbit.streamed.lib = type('L', (), {'hobbit_model_settle': lambda *_: 1,"
            " '__getattr__': lambda _, name: getattr(lib, name)})()\n"
            "llm._streamed.warm([0])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
