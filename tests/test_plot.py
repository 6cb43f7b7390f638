from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hobbit.errors import HobbitError, UsageError
from hobbit.plot import Mark, check, plot

MIB = 1 << 20
MARKS = [Mark("exact", 100 * MIB, 0.0), Mark("fast", 60 * MIB, 0.07, 0.01)]


def test_a_picture(tmp_path: Path) -> None:
    pixels = pytest.importorskip("matplotlib.image")
    path, more = tmp_path / "a.png", tmp_path / "b.png"
    plot(path, MARKS, title="m.gguf")
    plot(more, MARKS, curves=[("skip only", [Mark("", 80 * MIB, 0.1), Mark("", 50 * MIB, 0.5)])])
    first, second = pixels.imread(path), pixels.imread(more)
    assert first.shape == second.shape == (675, 1050, 4)
    assert (first != second).any()


def test_marks_that_a_logarithm_has_no_place_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(tmp_path / "a.png", [MARKS[0]], curves=[("none", [MARKS[0]])])
    plot(tmp_path / "b.png", [Mark("noisy", 5.0, 0.001, 0.5)])


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(HobbitError, match=r"cannot write .*a\.png: No such file"):
        plot(tmp_path / "absent" / "a.png", MARKS)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'hobbit-moe\[plot\]'") as info:
        check()
    assert "\n" not in str(info.value)
    with pytest.raises(UsageError):
        plot(tmp_path / "a.png", MARKS)
