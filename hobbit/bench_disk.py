"""What the disk gives: the rate that a roofline takes for the best that reading can do.

Run as a script, by its path, it prints the rate: a benchmark measures it in a process with the
limits of its arms.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SECONDS = 1.0
# As many reads are in flight as hobbit has.
_THREADS = 4
# Of a small file no more than this is read: what the disk caches tells nothing more.
_PASSES = 8
_SECTOR = 4096


def read_rate(path: Path, chunk: int, seconds: float = _SECONDS) -> float:
    """Return bytes a second of reads of `chunk` bytes at random places, past the page cache.

    Where the file system has no direct I/O the reads are ordinary ones.
    """
    try:
        return _read_rate(path, chunk, seconds, getattr(os, "O_DIRECT", 0))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    drop_from_page_cache(path)
    return _read_rate(path, chunk, seconds, 0)


def _read_rate(path: Path, chunk: int, seconds: float, flag: int) -> float:
    size = path.stat().st_size
    chunk = max(min(chunk, size) // _SECTOR, 1) * _SECTOR
    fd = os.open(path, os.O_RDONLY | flag)
    start = time.monotonic()

    def read(_: int) -> int:
        place, done = random.Random(), 0  # of other places than the last time
        with mmap.mmap(-1, chunk) as buffer:  # page-aligned, as direct reads demand
            while not done or (time.monotonic() - start < seconds and done < _PASSES * size):
                done += os.preadv(fd, [buffer], place.randrange(max(size // chunk, 1)) * chunk)
        return done

    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            total = sum(threads.map(read, range(_THREADS)))
        return total / (time.monotonic() - start)
    finally:
        os.close(fd)


def drop_from_page_cache(path: Path) -> None:
    """Drop a file's pages: those another process brought in would not count against a cap."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages are not dropped
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(read_rate(Path(sys.argv[-2]), int(sys.argv[-1])))
