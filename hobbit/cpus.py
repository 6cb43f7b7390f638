"""What the processor is like, and how much of it the process may use."""

from __future__ import annotations

import os
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")


def physical_cores(sysfs: Path = _SYSFS) -> int:
    """Count the cores, not the hardware threads, that the process may run on.

    Two threads of one core share its arithmetic units: a thread for each is slower, not faster.
    """
    allowed = _allowed()
    cores = {_siblings(sysfs / f"cpu{number}") or str(number) for number in allowed}
    return max(len(cores), 1)


def has_amx(cpuinfo: Path = _CPUINFO) -> bool:
    """llama-cpp-python 0.3.36 crashes in its AMX kernels; without repacking they are not used."""
    try:
        return "amx_tile" in cpuinfo.read_text()
    except OSError:
        return False


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the processor's name, "unknown" where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: Path) -> str:
    try:
        return (cpu / "topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""
