"""How fast the machine is: measured once, remembered, measured again when asked."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import tiny
from gates import layout_of

from hobbit import disk
from hobbit.errors import HobbitError
from hobbit.folders import recall, remember
from hobbit.layout import Layout
from hobbit.planning import machine, probe
from hobbit.planning.estimate import work_of
from hobbit.planning.machine import measured, sample_file

Q8_0 = 8


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_SAMPLE", 2 << 20)
    return layout_of(tiny.make(tmp_path / "m.gguf", "olmoe", n_layer=1))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which types were measured; they are taken to be quick."""
    kinds: list[int] = []

    def measure(kind: int, n_threads: int) -> probe.Speed:
        kinds.append(kind)
        return probe.Speed(1e10 * n_threads, 1e11)

    monkeypatch.setattr(probe, "measure", measure)
    return kinds


def test_a_speed_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LEAST_WEIGHTS", 16 << 20)
    monkeypatch.setattr(probe, "_MOST_WEIGHTS", 16 << 20)
    for kind in (Q8_0, 12):  # q4_K has blocks of 256
        found = probe.measure(kind, 1)
        assert 1e8 < found.decode < 1e12
        assert found.decode < found.prompt < 1e14


def test_what_was_measured_is_remembered(layout: Layout, probed: list[int]) -> None:
    work = work_of(layout)
    first = measured(layout, work, 1)
    assert first is not None
    before = [*probed]
    assert Q8_0 in before
    assert measured(layout, work, 1) == first
    assert probed == before
    assert measured(layout, work, 2) != first  # other threads are another matter
    measured(layout, work, 1, again=True)
    assert len(probed) == 3 * len(before)


def test_nothing_is_measured_where_only_what_is_known_counts(
    layout: Layout, probed: list[int]
) -> None:
    assert measured(layout, work_of(layout), 1, only_known=True) is None
    assert probed == []
    known = measured(layout, work_of(layout), 1)
    assert measured(layout, work_of(layout), 1, only_known=True) == known


def test_another_disk_is_taken_at_its_word(layout: Layout, probed: list[int]) -> None:
    found = measured(layout, work_of(layout), 1, read=5e8)
    assert found is not None
    assert (found.speeds.read, found.io, found.given_read) == (5e8, "given", True)
    assert "disks" not in recall(disk.FILE)


def test_the_models_own_file_is_read_where_it_is_here(layout: Layout, probed: list[int]) -> None:
    path = layout.gguf.parts[0].path
    found = measured(layout, work_of(layout), 1, path=path)
    assert found is not None
    assert found.speeds.read > 0
    assert len(recall(disk.FILE)["disks"]) == 1


def test_without_a_model_the_disk_is_written_to_only_to_measure_it(
    layout: Layout, probed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def sample(folder: Path) -> Path:
        written.append(folder)
        return sample_file(folder, 2 << 20)

    monkeypatch.setattr(machine, "sample_file", sample)
    assert measured(layout, work_of(layout), 1, only_known=True) is None
    first = measured(layout, work_of(layout), 1)
    assert measured(layout, work_of(layout), 1) == first
    assert measured(layout, work_of(layout), 1, only_known=True) == first
    assert len(written) == 1


@pytest.mark.parametrize("damage", ["old", "negative", "text", "list"])
def test_what_is_remembered_is_checked(layout: Layout, probed: list[int], damage: str) -> None:
    measured(layout, work_of(layout), 1)
    everything = recall(disk.FILE)
    long_ago = (datetime.now(timezone.utc) - timedelta(days=40)).isoformat()
    changes = {"old": {"date": long_ago}, "negative": {"decode": -1.0}, "text": {"prompt": "x"}}
    for key, known in everything["compute"].items():
        everything["compute"][key] = [] if damage == "list" else known | changes[damage]
    remember(disk.FILE, everything)
    assert measured(layout, work_of(layout), 1, only_known=True) is None


def test_a_busy_machine_is_measured_again_soon(layout: Layout, probed: list[int]) -> None:
    measured(layout, work_of(layout), 1)
    everything = recall(disk.FILE)
    date = (datetime.now(timezone.utc) - timedelta(hours=2)).isoformat()
    for known in everything["compute"].values():
        known |= {"date": date}
    remember(disk.FILE, everything)
    assert measured(layout, work_of(layout), 1, only_known=True) is not None
    for known in everything["compute"].values():
        known |= {"quiet": False}
    remember(disk.FILE, everything)
    assert measured(layout, work_of(layout), 1, only_known=True) is None


def test_other_programs_are_left_out_of_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter(range(1000))
    monkeypatch.setattr(probe, "_LEAST_WEIGHTS", 16 << 20)
    monkeypatch.setattr(probe, "_MOST_WEIGHTS", 16 << 20)
    monkeypatch.setattr(probe, "_waited", lambda: float(next(waited)))
    found = probe.measure(Q8_0, 2)
    assert not found.quiet
    assert 1e8 < found.decode < 1e12


def test_a_type_that_cannot_be_measured_is_left_out(
    layout: Layout, probed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kind: int, n_threads: int) -> probe.Speed:
        raise HobbitError("no")

    monkeypatch.setattr(probe, "measure", fail)
    with pytest.raises(HobbitError, match="no"):
        measured(layout, work_of(layout), 1)


def test_a_cache_that_cannot_be_written_asks_for_the_disks_speed(
    layout: Layout, probed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOBBIT_CACHE", "/proc/nowhere")
    with pytest.raises(HobbitError, match="--read-gbps"):
        measured(layout, work_of(layout), 1)


def test_speeds_are_beside_the_disks(layout: Layout, probed: list[int], tmp_path: Path) -> None:
    measured(layout, work_of(layout), 1)
    kept = json.loads((tmp_path / "cache" / disk.FILE).read_text())
    assert set(kept) == {"compute", "disks"}
