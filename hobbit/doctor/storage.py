"""The disk that models are read from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ..disk import THREADS, probe
from ..errors import HobbitError
from ..planning.machine import sample_file
from ..sizes import format_size
from .check import Check

# Experts are of such sizes; a read is of one of them.
SIZES = tuple(1 << power for power in range(16, 24))
_SECONDS = 0.16
# Below this a model is no pleasure to read from: half an older SATA disk's.
_SLOW = 250e6
_LEAST_FILE = 2 * SIZES[-1]


def checks(place: Path, quick: bool = False) -> Iterator[Check]:
    """Look at the disk under a folder or a file; `quick` leaves out how fast it is."""
    folder = place.parent if place.is_file() else place
    try:
        yield _device(folder)
        file = place if place.is_file() else _largest_model(folder)
        if file is not None and file.stat().st_size >= _LEAST_FILE:
            yield from _speed(file, quick)
            return
        with TemporaryDirectory(prefix=".doctor-", dir=folder) as temporary:
            yield from _speed(sample_file(Path(temporary)), quick)
    except (OSError, HobbitError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        yield Check(
            "disk", "FAIL", f"{place}: {reason}", "name a folder that can be read and written"
        )


def _largest_model(folder: Path) -> Path | None:
    found = [path for path in folder.glob("**/*.gguf") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_size, default=None)


def _speed(file: Path, quick: bool) -> Iterator[Check]:
    first = probe(file, [SIZES[4]], seconds=_SECONDS)
    if first.io == "direct":
        yield Check("direct reads", "ok", f"work on {file.parent}")
    else:
        advice = "reads cost more here: put models on a local ext4, xfs or btrfs"
        yield Check("direct reads", "warn", f"refused by the file system of {file.parent}", advice)
    if not quick:
        yield _curve(file)


def _curve(file: Path) -> Check:
    """Read at each size, with one thread and with as many as hobbit has."""
    rates = {
        n: [probe(file, [size], seconds=_SECONDS, threads=n).bytes_per_s for size in SIZES]
        for n in (1, THREADS)
    }
    shown = ", ".join(
        f"{format_size(size).replace('.0', '')} {alone / 1e9:.2f}/{all_ / 1e9:.2f}"
        for size, alone, all_ in zip(SIZES, *rates.values(), strict=True)
    )
    found = f"GB/s with 1/{THREADS} threads: {shown}"
    facts = {"sizes": list(SIZES), "bytes_s": {str(n): rate for n, rate in rates.items()}}
    best = max(rates[THREADS])
    if best < _SLOW:
        advice = f"{best / 1e6:.0f} MB/s is slow: put models on an SSD, or use -Q"
        return Check("disk", "warn", found, advice, facts)
    return Check("disk", "ok", found, facts=facts)


def _device(folder: Path) -> Check:
    """Say what kind of disk it is, where the system tells."""
    device = folder.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not place.exists():
        return Check("device", "ok", f"{folder} is on no block device of this machine")
    disk = place.resolve()
    queue = (disk.parent if (disk / "partition").exists() else disk) / "queue"
    rotational, scheduler = _word(queue / "rotational"), _word(queue / "scheduler")
    scheduler = scheduler.partition("[")[2].partition("]")[0] or scheduler or "unknown"
    facts = {"rotational": rotational == "1", "scheduler": scheduler}
    found = f"{queue.parent.name}, scheduler {scheduler}"
    # Virtual disks often say that they turn.
    virtual = queue.parent.name.startswith(("vd", "xvd"))
    if rotational == "1" and not virtual:
        return Check(
            "device", "warn", f"{found}, a turning disk", "an SSD is 10 times as fast", facts
        )
    return Check("device", "ok", found, facts=facts)


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
