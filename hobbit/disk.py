"""How fast the disk delivers experts: measured in a second, then remembered for a week.

A drive's data sheet is no guide: what counts is reads of one expert's size, at random places of
the model's file, from as many threads as hobbit reads with, on the file system and under the limits
that the process has.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from .errors import ModelError
from .folders import recall, remember

FILE = "machine.json"
KEPT = timedelta(days=7)
# As native/reader.c: an expert is read in blocks, by several threads, from aligned places.
BLOCK = 2 << 20
PAGE = 4096
THREADS = 4
# The share of the time in which one expert at a time is read.
_LATENCY_SHARE = 0.25
_FLAGS = os.O_RDONLY | os.O_CLOEXEC


@dataclass(frozen=True)
class DiskRate:
    """What a disk does when it reads experts of `piece_bytes`.

    `bytes_per_s` and `pieces_per_s` with all threads busy, `latency_s` for one expert when nothing
    else is read. `io` is "direct" or "buffered"; `date` is in ISO format, UTC.
    """

    bytes_per_s: float
    latency_s: float
    pieces_per_s: float
    piece_bytes: int
    io: str
    date: str


def known_rate(path: Path, piece_bytes: Sequence[int], direct: bool = True) -> DiskRate | None:
    """Return what is remembered of this disk at about this size."""
    return _recalled(_key(path, sum(piece_bytes), direct))


def rate(
    path: Path, piece_bytes: Sequence[int], direct: bool = True, again: bool = False
) -> DiskRate:
    """Return what is remembered of this disk at about this size, or else probe it.

    With `again` it is probed in any case.
    """
    key = _key(path, sum(piece_bytes), direct)
    known = None if again else _recalled(key)
    if known is not None:
        return known
    measured = probe(path, piece_bytes, direct=direct)
    disks = recall(FILE).get("disks")
    rest = disks if isinstance(disks, dict) else {}
    remember(FILE, recall(FILE) | {"disks": rest | {key: asdict(measured)}})
    return measured


def probe(
    path: Path,
    piece_bytes: Sequence[int],
    seconds: float = 1.0,
    threads: int = THREADS,
    direct: bool = True,
) -> DiskRate:
    """Read experts at random places of a file for about `seconds`.

    `piece_bytes` has the size of each matrix of an expert: they lie apart in the file. Without
    direct I/O the page cache is told to drop what is read, before and after. A disk so slow that a
    block outlasts the time is waited for.
    """
    file = _File(path, direct)
    try:
        with ThreadPoolExecutor(threads) as pool:
            latency, alone = _one_at_a_time(file, piece_bytes, seconds * _LATENCY_SHARE, pool)
            left = seconds * (1 - _LATENCY_SHARE)
            speed = (
                _all_at_once(file, piece_bytes, left, pool, threads) if latency < left else alone
            )
    except OSError as exc:
        raise ModelError(f"{path}: cannot read it: {exc.strerror}") from exc
    finally:
        file.close()
    return DiskRate(
        bytes_per_s=speed,
        latency_s=latency,
        pieces_per_s=speed / sum(piece_bytes),
        piece_bytes=sum(piece_bytes),
        io="direct" if file.direct else "buffered",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def keep_reading(path: Path, piece_bytes: Sequence[int], bytes_per_s: float) -> None:
    """Read experts at random places at this rate, as long as the parent process is there."""
    file, parent, start = _File(path, True), os.getppid(), time.perf_counter()

    def work(_: int) -> None:
        done = 0
        while True:
            for block in _blocks(file, piece_bytes):
                if os.getppid() != parent:
                    return
                done += file.read(block)
                early = done * THREADS / bytes_per_s - (time.perf_counter() - start)
                time.sleep(max(early, 0.0))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def drop_from_page_cache(path: Path) -> None:
    """Drop a file's pages: those another process brought in would not count against a cap."""
    fd = os.open(path, _FLAGS)
    try:
        os.fsync(fd)  # dirty pages are not dropped
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


class _File:
    """A file that is read past the page cache, into a buffer of each thread's own."""

    def __init__(self, path: Path, direct: bool) -> None:
        self._local = threading.local()
        try:
            self.size = path.stat().st_size
            self.direct = direct and self._open_direct(path)
            if not self.direct:
                self._fd = os.open(path, _FLAGS)
        except OSError as exc:
            raise ModelError(f"{path}: cannot read it: {exc.strerror}") from exc
        if self.size < PAGE:
            self.close()
            raise ModelError(f"{path}: too small to measure its disk with")

    def _open_direct(self, path: Path) -> bool:
        """Whether direct I/O works is known only when something was read."""
        linux, macos = getattr(os, "O_DIRECT", 0), getattr(fcntl, "F_NOCACHE", 0)
        if not linux and not macos:
            return False
        try:
            self._fd = os.open(path, _FLAGS | linux)
        except OSError:
            return False
        try:
            if not linux:
                fcntl.fcntl(self._fd, macos, 1)
            os.preadv(self._fd, [memoryview(self.buffer)[:PAGE]], 0)
        except OSError:
            self.close()
            return False
        return True

    @property
    def buffer(self) -> mmap.mmap:
        """The calling thread's, aligned to a page."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, BLOCK)
        buffer: mmap.mmap = self._local.buffer
        return buffer

    def read(self, block: tuple[int, int]) -> int:
        """Read (offset, length), both of whole pages; return the bytes that there were."""
        offset, length = block
        self._forget(offset, length)
        done = os.preadv(self._fd, [memoryview(self.buffer)[:length]], offset)
        self._forget(offset, length)
        return done

    def _forget(self, offset: int, length: int) -> None:
        """The page cache keeps up to 2 MiB as one: a part of that is not dropped."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            start = offset // BLOCK * BLOCK
            end = -(-(offset + length) // BLOCK) * BLOCK
            os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)


def _blocks(file: _File, piece_bytes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the blocks of one expert: each matrix is at a random place."""
    for size in piece_bytes:
        length = min(-(-size // PAGE), file.size // PAGE) * PAGE
        start = random.randrange(0, (file.size - length) // PAGE + 1) * PAGE
        for position in range(0, length, BLOCK):
            yield start + position, min(BLOCK, length - position)


def _one_at_a_time(
    file: _File, piece_bytes: Sequence[int], seconds: float, pool: ThreadPoolExecutor
) -> tuple[float, float]:
    """Return the median time of an expert whose blocks are shared by the threads, and bytes/s."""
    start = time.perf_counter()
    times: list[float] = []
    done = 0
    while not times or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        done += sum(pool.map(file.read, _blocks(file, piece_bytes)))
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2], done / sum(times)


def _all_at_once(
    file: _File, piece_bytes: Sequence[int], seconds: float, pool: ThreadPoolExecutor, threads: int
) -> float:
    """Return the bytes/s of threads that read one expert after another."""
    start = time.perf_counter()

    def work(_: int) -> int:
        done = 0
        while True:
            for block in _blocks(file, piece_bytes):
                done += file.read(block)
                if time.perf_counter() - start >= seconds:
                    return done

    done = sum(pool.map(work, range(threads)))
    return done / (time.perf_counter() - start)


def _recalled(key: str) -> DiskRate | None:
    disks = recall(FILE).get("disks")
    found: Any = disks.get(key) if isinstance(disks, dict) else None
    try:
        known = DiskRate(**found)
        age = datetime.now(timezone.utc) - datetime.fromisoformat(known.date)
        numbers = (known.bytes_per_s, known.latency_s, known.pieces_per_s, known.piece_bytes)
        sound = all(0 < float(number) < float("inf") for number in numbers)
    except (TypeError, ValueError, OverflowError):
        return None
    return known if sound and timedelta(0) <= age < KEPT else None


def _key(path: Path, piece_bytes: int, direct: bool) -> str:
    """Name the device, its file system, the kind of read, and the size to a power of two."""
    try:
        device = path.stat().st_dev
    except OSError as exc:
        raise ModelError(f"{path}: cannot read it: {exc.strerror}") from exc
    io = "direct" if direct else "buffered"
    numbers = f"{os.major(device)}:{os.minor(device)}"
    return f"{numbers} {_mounted(path)} {io} {piece_bytes.bit_length()}"


def _mounted(path: Path) -> str:
    """Return type and source of the file system that the path is on, where the system tells."""
    real, best, name = path.resolve(), Path(), "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return name
    for line in lines:
        fields, _, tail = line.partition(" - ")
        mount = Path(fields.split()[4])
        if real.is_relative_to(mount) and len(mount.parts) >= len(best.parts):
            best, name = mount, " ".join(tail.split()[:2])
    return name
