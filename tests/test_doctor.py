"""The checks of `hobbit doctor`, on systems made of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hobbit.doctor import engine, storage, system
from hobbit.doctor.check import Check


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 8 GiB without limits."""
    write(tmp_path, "proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_line_says_state_name_and_advice() -> None:
    assert Check("swap", "ok", "none").line() == "ok    swap         none"
    assert Check("disk", "FAIL", "gone", "buy one").line() == "FAIL  disk         gone: buy one"


def test_memory_is_that_of_the_machine_or_the_group(root: Path) -> None:
    assert system.memory(root).state == "ok"
    assert "6.0 GiB of 8.0 GiB" in system.memory(root).found
    write(root, "proc/self/cgroup", "0::/mine\n")
    write(root, "proc/self/mountinfo", "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n")
    write(root, "sys/fs/cgroup/mine/memory.max", str(1 << 30))
    write(root, "sys/fs/cgroup/mine/memory.current", "0")
    found = system.memory(root)
    assert found.state == "warn"
    assert "cgroup /mine" in found.found


def test_swap_in_use_is_told(root: Path) -> None:
    assert system.swap(root) == Check("swap", "ok", "none", "", {"total_bytes": 0, "used_bytes": 0})
    write(root, "proc/meminfo", "SwapTotal: 2048 kB\nSwapFree: 2048 kB\n")
    assert system.swap(root).state == "ok"
    write(root, "proc/meminfo", "SwapTotal: 2048 kB\nSwapFree: 1024 kB\n")
    assert system.swap(root).state == "warn"
    assert "1.0 MiB of 2.0 MiB" in system.swap(root).found


@pytest.mark.parametrize(
    ("group", "file", "text"),
    [
        ("0::/a/b\n", "sys/fs/cgroup/a/cpu.max", "50000 100000"),
        ("3:cpu,cpuacct:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000"),
    ],
)
def test_a_quota_of_processors_is_found(
    root: Path, monkeypatch: pytest.MonkeyPatch, group: str, file: str, text: str
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    write(root, "proc/self/cgroup", group)
    write(root, "sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert system.processor(root).state == "ok"
    write(root, file, text)
    write(root, "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000")
    found = system.processor(root)
    assert (found.state, found.facts["quota"]) == ("warn", 0.5)
    assert found.advice.startswith("use -t 1")


def test_a_busy_machine_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert system.processor(root).state == "warn"


def test_huge_pages(root: Path) -> None:
    name = "sys/kernel/mm/transparent_hugepage/enabled"
    assert system.huge_pages(root).found == "not there"
    write(root, name, "always [madvise] never\n")
    assert system.huge_pages(root).state == "ok"
    write(root, name, "always madvise [never]\n")
    assert system.huge_pages(root).state == "warn"


def test_a_container_is_named(root: Path) -> None:
    assert system.container(root).found == "none"
    write(root, "run/.containerenv", "")
    assert system.container(root).found == "podman"


def test_a_jetson_is_known_by_its_device_tree(root: Path) -> None:
    assert [check.name for check in system.checks(root)][-1] == "container"
    write(root, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    write(root, "var/lib/nvpmodel/status", "pmode:0001\n")
    jetson = [*system.checks(root)][-1]
    assert jetson.found == "NVIDIA Jetson Orin Nano Developer Kit, power mode 0001"
    assert jetson.state == "warn"
    write(root, "var/lib/nvpmodel/status", "pmode:0000\n")
    assert [*system.checks(root)][-1].state == "ok"


def test_the_build_is_the_one_that_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {check.name: check for check in engine.checks()}
    assert [*checks] == ["build", "instructions", "devices", "plugin", "device CPU"]
    assert all(check.state != "FAIL" for check in checks.values())
    assert "CPU" in checks["devices"].facts["backends"]
    real = engine.version
    monkeypatch.setattr(
        engine, "version", lambda name: "0.1" if name.startswith("llama") else real(name)
    )
    (failed,) = engine.checks()
    assert failed.state == "FAIL"
    assert "pip install llama-cpp-python==" in failed.advice


def test_a_plugin_that_does_not_load_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("undefined symbol")

    monkeypatch.setattr("hobbit._native.register", broken)
    plugin = [*engine.checks()][-1]
    assert (plugin.name, plugin.state) == ("plugin", "FAIL")
    assert "undefined symbol" in plugin.found


def test_the_disk_is_measured_at_the_sizes_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SECONDS", 0.01)
    checks = {check.name: check for check in storage.checks(tmp_path)}
    assert [*checks] == ["device", "direct reads", "disk"]
    rates = checks["disk"].facts["bytes_s"]
    assert all(len(rate) == len(storage.SIZES) and min(rate) > 0 for rate in rates.values())
    assert [*tmp_path.iterdir()] == []  # nothing is left behind
    quick = [check.name for check in storage.checks(tmp_path, quick=True)]
    assert quick == ["device", "direct reads"]


def test_a_slow_disk_and_a_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SECONDS", 0.01)
    monkeypatch.setattr(storage, "_SLOW", 1e15)
    assert [*storage.checks(tmp_path)][-1].state == "warn"
    (missing,) = storage.checks(tmp_path / "nowhere" / "at all")
    assert missing.state == "FAIL"
    assert not (tmp_path / "nowhere").exists()
