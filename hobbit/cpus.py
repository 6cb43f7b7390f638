"""How many processors the process may use."""

from __future__ import annotations

import os
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu")


def physical_cores(sysfs: Path = _SYSFS) -> int:
    """Count the cores, not the hardware threads, that the process may run on.

    Two threads of one core share its arithmetic units: a thread for each is slower, not faster.
    """
    allowed = _allowed()
    cores = {_siblings(sysfs / f"cpu{number}") or str(number) for number in allowed}
    return max(len(cores), 1)


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: Path) -> str:
    try:
        return (cpu / "topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""
