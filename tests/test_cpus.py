from __future__ import annotations

from pathlib import Path

import pytest

from hobbit import cpus


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_allowed", lambda: {0, 1, 2, 3})


def topology(sysfs: Path, siblings: dict[int, str]) -> Path:
    for number, text in siblings.items():
        folder = sysfs / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    return sysfs


@pytest.mark.usefixtures("four_threads")
def test_hardware_threads_share_a_core(tmp_path: Path) -> None:
    sysfs = topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert cpus.physical_cores(sysfs) == 2


@pytest.mark.usefixtures("four_threads")
def test_without_a_topology(tmp_path: Path) -> None:
    assert cpus.physical_cores(tmp_path) == 4


def test_amx(tmp_path: Path) -> None:
    (tmp_path / "with").write_text("flags : fpu amx_bf16 amx_tile\n")
    (tmp_path / "without").write_text("flags : fpu avx2\n")
    found = [cpus.has_amx(tmp_path / name) for name in ("with", "without", "absent")]
    assert found == [True, False, False]


def test_this_machine() -> None:
    assert cpus.physical_cores() >= 1
