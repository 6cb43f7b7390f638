"""How fast the disk is: that it is measured, remembered, and forgotten when it may be wrong."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from gates import open_files, skip_without_direct

from hobbit import disk
from hobbit.disk import DiskRate, probe, rate
from hobbit.errors import ModelError
from hobbit.folders import recall, remember

SIZES = (150_000, 150_000, 300_001)
TOTAL = sum(SIZES)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    with open(path, "wb") as out:
        out.write(os.urandom(5 << 20))
        os.fsync(out.fileno())
    return path


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were probed; the probes are made short."""
    done: list[Path] = []

    def short(path: Path, sizes: Any, **more: Any) -> DiskRate:
        done.append(path)
        return probe(path, sizes, seconds=0.02, **more)

    monkeypatch.setattr(disk, "probe", short)
    return done


def edit(**changes: Any) -> None:
    """Change what is remembered of every disk."""
    disks = recall(disk.FILE)["disks"]
    remember(disk.FILE, {"disks": {key: known | changes for key, known in disks.items()}})


def test_a_probe_is_plausible(file: Path) -> None:
    before = open_files()
    found = probe(file, SIZES, seconds=0.2)
    assert found.piece_bytes == TOTAL
    assert 0 < found.latency_s < 5
    assert 1e5 < found.bytes_per_s < 1e12
    assert found.pieces_per_s == pytest.approx(found.bytes_per_s / TOTAL)
    assert found.io in ("direct", "buffered")
    assert open_files() == before


def test_it_reads_directly_where_it_can(file: Path) -> None:
    skip_without_direct(file)
    assert probe(file, SIZES, seconds=0.02).io == "direct"
    assert probe(file, SIZES, seconds=0.02, direct=False).io == "buffered"


def test_without_direct_reads_it_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if os.O_DIRECT & disk.fcntl.fcntl(fd, disk.fcntl.F_GETFL):
            raise OSError(22, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    assert probe(file, SIZES, seconds=0.02).io == "buffered"


def test_reads_are_aligned_and_inside_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, places = os.preadv, []

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        places.append((offset, len(buffers[0])))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    probe(file, (3 << 20, 100), seconds=0.05)
    assert all(o % 4096 == 0 and n % 4096 == 0 and o + n <= 5 << 20 for o, n in places)
    assert {n for _, n in places} >= {2 << 20, 1 << 20, 4096}
    assert len({o for o, _ in places}) > 5


@pytest.mark.parametrize("sizes", [(1,), (64 << 20,)])
def test_odd_sizes(file: Path, sizes: tuple[int, ...]) -> None:
    assert probe(file, sizes, seconds=0.02, threads=1).bytes_per_s > 0


def test_what_is_remembered_is_not_measured(file: Path, probes: list[Path]) -> None:
    first = rate(file, SIZES)
    file.write_bytes(bytes(4096))
    assert rate(file, SIZES) == first
    assert rate(file, [TOTAL]) == first  # the size of an expert counts
    assert len(probes) == 1
    rate(file, [TOTAL * 2])
    rate(file, SIZES, direct=False)
    assert len(probes) == 3
    assert len(recall(disk.FILE)["disks"]) == 3


def test_it_is_measured_again_after_a_week(file: Path, probes: list[Path]) -> None:
    first = rate(file, SIZES)
    now = datetime.now(timezone.utc)
    edit(date=(now - timedelta(days=6)).isoformat())
    rate(file, SIZES)
    assert len(probes) == 1
    for date in (now - timedelta(days=8), now + timedelta(days=1)):
        edit(date=date.isoformat())
        assert rate(file, SIZES).date >= first.date
    assert len(probes) == 3


def test_another_device_is_measured(
    file: Path, probes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rate(file, SIZES)
    monkeypatch.setattr(disk, "_mounted", lambda path: "ext4 /dev/other")
    rate(file, SIZES)
    monkeypatch.setattr(os, "major", lambda device: 77)
    rate(file, SIZES)
    assert len(probes) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"disks": 3}',
        "[" * 100_000,
        '{"disks": {"KEY": 5}}',
        '{"disks": {"KEY": {}}}',
    ],
)
def test_a_corrupt_file_is_harmless(file: Path, probes: list[Path], text: str) -> None:
    folder = Path(os.environ["HOBBIT_CACHE"])
    folder.mkdir()
    key = disk._key(file, TOTAL, True)
    (folder / disk.FILE).write_text(text.replace("KEY", key))
    assert rate(file, SIZES).bytes_per_s > 0
    assert rate(file, SIZES).bytes_per_s > 0
    assert len(probes) == 1  # it was replaced


@pytest.mark.parametrize(
    "change",
    [
        {"bytes_per_s": 0},
        {"bytes_per_s": 10**400},
        {"latency_s": None},
        {"date": "yesterday"},
        {"more": 1},
    ],
)
def test_nonsense_is_measured_again(file: Path, probes: list[Path], change: dict[str, Any]) -> None:
    rate(file, SIZES)
    edit(**change)
    rate(file, SIZES)
    assert len(probes) == 2


def test_a_folder_that_cannot_be_written(file: Path, probes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert rate(file, SIZES).bytes_per_s > 0
    assert rate(file, SIZES).bytes_per_s > 0
    assert len(probes) == 2


def test_other_things_in_the_file_stay(file: Path, probes: list[Path]) -> None:
    remember(disk.FILE, {"other": 1, "disks": {"x": 2}})
    found = rate(file, SIZES)
    kept = recall(disk.FILE)
    assert (kept["other"], kept["disks"]["x"]) == (1, 2)
    assert asdict(replace(found)) in kept["disks"].values()
    assert [*json.loads(json.dumps(kept))] == ["other", "disks"]
    assert [p.name for p in Path(os.environ["HOBBIT_CACHE"]).iterdir()] == [disk.FILE]


def test_files_that_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x")
    for path in (tmp_path / "none", tmp_path / "small", tmp_path):
        with pytest.raises(ModelError, match=str(path)):
            probe(path, SIZES, seconds=0.02)
    with pytest.raises(ModelError, match="cannot read it"):
        rate(tmp_path / "none", SIZES)
