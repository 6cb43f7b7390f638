"""How fast this machine is: measured when it is first asked, then remembered."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import disk
from ..cpus import cpu_name
from ..errors import HobbitError
from ..folders import cache_folder, recall, remember
from ..gguf_file import GGML_TYPES
from ..layout import Layout
from .estimate import Speeds, Work

KEPT = timedelta(days=30)
# What was worked out while other programs took the processor.
_KEPT_BUSY = timedelta(hours=1)
# Types of less than this share of a token's bytes are not worth measuring.
_LEAST_SHARE = 0.04
_SECTION = "compute"
# What is read where there is no model yet: larger than what is read at once.
_SAMPLE = 64 << 20


@dataclass(frozen=True)
class Machine:
    """What was measured: speeds, how the disk is read, and on how many threads."""

    speeds: Speeds
    n_threads: int
    io: str
    given_read: bool = False

    def with_read(self, bytes_per_s: float) -> Machine:
        """Return the machine with another disk."""
        return replace(
            self, speeds=replace(self.speeds, read=bytes_per_s), given_read=True, io="given"
        )


def measured(
    layout: Layout,
    work: Work,
    n_threads: int,
    *,
    path: Path | None = None,
    read: float | None = None,
    again: bool = False,
    only_known: bool = False,
) -> Machine | None:
    """Return this machine's speeds at what the model needs.

    `path` is a file on the disk that counts (default: hobbit's cache folder), `read` is used in
    place of a measurement of it. `again` measures what is remembered too; with `only_known` nothing
    is measured, and what is not remembered is None.
    """
    compute = _compute(_kinds(work), n_threads, again, only_known)
    if compute is None:
        return None
    speeds = Speeds(compute["decode"], compute["prompt"], read or 1.0)
    if read is not None or not layout.groups:
        return Machine(speeds, n_threads, "given" if read else "none", read is not None)
    pieces = [matrix.file_bytes for matrix in layout.groups[0].matrices]
    rate = _rate(path, pieces, again, only_known)
    if rate is None:
        return None
    return Machine(replace(speeds, read=rate.bytes_per_s), n_threads, rate.io)


def _kinds(work: Work) -> list[int]:
    sizes = work.bytes_of()
    total = sum(sizes.values())
    return [kind for kind, size in sizes.most_common() if size >= _LEAST_SHARE * total]


def _compute(
    kinds: Iterable[int], n_threads: int, again: bool, only_known: bool
) -> dict[str, dict[int, float]] | None:
    found: dict[str, dict[int, float]] = {"decode": {}, "prompt": {}}
    failure: HobbitError | None = None
    for kind in kinds:
        known = None if again else _recalled(kind, n_threads)
        if known is None and only_known:
            return None
        try:
            speed = known or _measured(kind, n_threads)
        except HobbitError as exc:  # a type that this build cannot multiply by
            failure = exc
            continue
        for name in found:
            found[name][kind] = speed[name]
    if failure is not None and not found["decode"]:
        raise failure
    return found


def _measured(kind: int, n_threads: int) -> dict[str, float]:
    from .probe import measure

    found = measure(kind, n_threads)
    speed = {"decode": found.decode, "prompt": found.prompt}
    section = recall(disk.FILE).get(_SECTION)
    rest = section if isinstance(section, dict) else {}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    known = {_key(kind, n_threads): speed | {"date": date, "quiet": found.quiet}}
    remember(disk.FILE, recall(disk.FILE) | {_SECTION: rest | known})
    return speed


def _recalled(kind: int, n_threads: int) -> dict[str, float] | None:
    section = recall(disk.FILE).get(_SECTION)
    found: Any = section.get(_key(kind, n_threads)) if isinstance(section, dict) else None
    try:
        age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
        speed = {name: float(found[name]) for name in ("decode", "prompt")}
    except (TypeError, ValueError, KeyError):
        return None
    sound = all(0 < number < float("inf") for number in speed.values())
    kept = KEPT if found.get("quiet", True) else _KEPT_BUSY
    return speed if sound and timedelta(0) <= age < kept else None


def _key(kind: int, n_threads: int) -> str:
    return f"{cpu_name()} t{n_threads} {GGML_TYPES[kind].name}"


def _rate(
    path: Path | None, pieces: Sequence[int], again: bool, only_known: bool
) -> disk.DiskRate | None:
    """Read the model's own file; where there is none, one of our own on the cache's disk."""
    if path is not None:
        if only_known:
            return disk.known_rate(path, pieces)
        return disk.rate(path, pieces, again=again)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = None if again else disk.known_rate(folder, pieces)
        if known is not None or only_known:
            return known
        with TemporaryDirectory(prefix=".probe-", dir=folder) as place:
            return disk.rate(sample_file(Path(place)), pieces, again=again)
    except OSError as exc:
        raise HobbitError(
            f"{folder}: the disk cannot be measured ({exc.strerror}): give its speed with "
            "--read-gbps"
        ) from exc


def sample_file(folder: Path, size: int = _SAMPLE) -> Path:
    """Write a file of incompressible bytes, on the disk for good, to read from."""
    path = folder / "sample.bin"
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return path
