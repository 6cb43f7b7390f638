"""Processor, memory, and what limits them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..cpus import cpu_name, physical_cores
from ..memory import available_memory, total_memory
from ..sizes import format_size
from .check import Check

_ROOT = Path("/")
# Hardly any model of use runs in less.
_LITTLE = 2 << 30


def checks(root: Path = _ROOT) -> Iterator[Check]:
    """Look at the machine under `root`, whose files are those of a Linux system."""
    yield processor(root)
    yield memory(root)
    yield swap(root)
    yield huge_pages(root)
    yield container(root)
    if (jetson := _text(root / "proc/device-tree/model").strip("\0 \n")) and _is_jetson(jetson):
        yield power(root, jetson)


def processor(root: Path = _ROOT) -> Check:
    cores, threads = physical_cores(), os.cpu_count() or 1
    quota = _cpu_quota(root)
    found = f"{cores} cores ({threads} threads), {cpu_name()}"
    facts = {"cores": cores, "threads": threads, "quota": quota}
    if quota is not None and quota < cores:
        advice = f"use -t {max(int(quota), 1)}: more threads than that wait for one another"
        return Check("processor", "warn", f"{found}, a quota of {quota:g}", advice, facts)
    load = os.getloadavg()[0]
    if load > cores:
        advice = "end what else computes: a thread that waits for a core stops all"
        return Check("processor", "warn", f"{found}, load {load:.1f}", advice, facts)
    return Check("processor", "ok", found, facts=facts)


def memory(root: Path = _ROOT) -> Check:
    total, what = total_memory(root)
    free, why = available_memory(root)
    facts = {"total_bytes": total, "limit": what, "available_bytes": free}
    found = f"{format_size(free)} of {format_size(total)} ({what}) available"
    if free < _LITTLE:
        advice = f"end other programs, or raise the limit ({why})"
        return Check("memory", "warn", found, advice, facts)
    return Check("memory", "ok", found, facts=facts)


def swap(root: Path = _ROOT) -> Check:
    fields = _meminfo(root)
    total = fields.get("SwapTotal", 0)
    used = total - fields.get("SwapFree", 0)
    facts = {"total_bytes": total, "used_bytes": used}
    if used > 0:
        found = f"{format_size(used)} of {format_size(total)} in use"
        advice = "a cap that fits needs none: lower --memory, then swapoff -a"
        return Check("swap", "warn", found, advice, facts)
    return Check("swap", "ok", f"{format_size(total)}, none in use" if total else "none", "", facts)


def huge_pages(root: Path = _ROOT) -> Check:
    setting = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting.partition("[")[2].partition("]")[0] or "not there"
    if chosen == "never":
        advice = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Check("huge pages", "warn", "never", advice)
    return Check("huge pages", "ok", chosen)


def container(root: Path = _ROOT) -> Check:
    marks = {"docker": root / ".dockerenv", "podman": root / "run/.containerenv"}
    inside = next((name for name, mark in marks.items() if mark.exists()), "")
    return Check("container", "ok", inside or "none", facts={"kind": inside or None})


def power(root: Path, name: str) -> Check:
    """A Jetson is as fast as its power mode; 0 is the fastest."""
    mode = _text(root / "var/lib/nvpmodel/status").strip().removeprefix("pmode:")
    found = f"{name}, power mode {mode or 'unknown'}"
    if mode.isdigit() and int(mode) == 0:
        return Check("jetson", "ok", found)
    return Check("jetson", "warn", found, "sudo nvpmodel -m 0, which is the fastest")


def _is_jetson(model: str) -> bool:
    return "jetson" in model.lower() or "nvidia" in model.lower()


def _cpu_quota(root: Path) -> float | None:
    """Return how many processors' time the process's control groups allow it."""
    quotas = []
    for folder in _cpu_groups(root):
        both = _text(folder / "cpu.max").split()
        if len(both) != 2:
            both = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(text.isdigit() and int(text) > 0 for text in both):
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's group and of those above it, as far as they are shown."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for base in (mount,) if number == "0" else (mount / "cpu", mount / "cpu,cpuacct"):
            folder = base / path.lstrip("/")
            while folder.is_relative_to(base):
                yield folder
                folder = folder.parent


def _meminfo(root: Path) -> dict[str, int]:
    fields = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            fields[name] = int(number[0]) * 1024
    return fields


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
