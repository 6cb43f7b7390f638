"""What the gate tests share: tiny models made once a session, and stock's logits of them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import hobbit
from hobbit._native import lib
from hobbit.gguf_file import open_gguf
from hobbit.layout import Layout, build_layout, used_key
from hobbit.stats import Stats
from hobbit.stock import Job, Logits, StockProcess, collect
from hobbit.verify import cache_bytes

# One thread: ggml's workers spin, and on a busy machine two cost a hundred times the work itself.
JOB = Job(n_prompt=80, n_decode=32, n_ubatch=32, n_threads=1)


def layout_of(path: Path) -> Layout:
    return build_layout(open_gguf(path))


@dataclass
class Bench:
    """Makes models and runs both arms; every model and every stock result is made once."""

    folder: Path
    _models: dict[str, Path] = field(default_factory=dict)
    _expected: dict[tuple[Path, Job, int | None], Logits] = field(default_factory=dict)
    _stock: StockProcess | None = None

    def model(self, name: str, make: Callable[[Path], Path]) -> Path:
        """Return the model of this name, made by `make` the first time."""
        if name not in self._models:
            self._models[name] = make(self.folder / f"{name}.gguf")
        return self._models[name]

    def arch(self, arch: str, **changes: Any) -> Path:
        """Return the tiny model of an architecture."""
        name = f"{arch}-{zlib.crc32(repr(changes).encode()):08x}" if changes else arch
        return self.model(name, lambda path: tiny.make(path, arch, **changes))

    def stock(self, path: Path, job: Job = JOB, n_expert_used: int | None = None) -> Logits:
        """Return stock's logits; raise DecodeFailed where stock cannot run the job."""
        key = path, job, n_expert_used
        if key not in self._expected:
            if self._stock is None:
                self._stock = StockProcess()
            told = None if n_expert_used is None else {used_key(open_gguf(path)): n_expert_used}
            try:
                (self._expected[key],) = self._stock.logits(
                    path, [job], mmap=False, kv_overrides=told
                )
            except Exception:
                self.close()  # an abort took the child with it
                raise
        return self._expected[key]

    def close(self) -> None:
        if self._stock is not None:
            self._stock.close()
            self._stock = None


@contextlib.contextmanager
def opened(
    path: Path, cache: str | int, job: Job = JOB, **arguments: Any
) -> Iterator[hobbit.Llama]:
    """Open a model as the gates do, at a named cache size or a number of bytes."""
    size = cache if isinstance(cache, int) else cache_bytes(layout_of(path), cache)
    with contextlib.closing(
        hobbit.Llama(str(path), cache_bytes=size, **job.llama_arguments(), **arguments)
    ) as llama:
        yield llama


def assert_same(expected: Logits, found: Logits, what: str = "") -> None:
    """Fail unless both are the same bits, saying where they part."""
    if expected.tobytes() == found.tobytes():
        return
    different = (expected.view(np.uint32) != found.view(np.uint32)).any(axis=2)
    where = np.argwhere(different)
    gap = np.nanmax(np.abs(expected - found))
    raise AssertionError(
        f"{what}: {len(where)} of {different.size} rows of logits differ, first at (position, "
        f"sequence) {tuple(where[0].tolist())}, by at most {gap}"
    )


def skip_without_direct(path: Path) -> None:
    """Skip a test of direct reads on a file system that has none, as tmpfs before Linux 6.6."""
    try:
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
    except OSError:
        pytest.skip(f"{path.parent} is on a file system without direct I/O")


def run(llama: hobbit.Llama, job: Job = JOB) -> Logits:
    return collect(llama, job)


def open_files() -> list[str]:
    """Return what this process's descriptors point to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_threads(*calls: Callable[[], None]) -> None:
    """Run the calls at the same time and raise what the first failing one raised."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # raised below, in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a call hangs"


def settled(llm: hobbit.Llama) -> Stats:
    """The counters, when what was read ahead has been taken in."""
    while lib.hobbit_model_settle(llm._moe()._handle):
        time.sleep(0.001)
    return llm.stats
