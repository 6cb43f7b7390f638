"""What runs leave for later plans: errors, hit rates, and the file that `hobbit why` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hobbit.folders import recall, remember, state_folder
from hobbit.planning import history
from hobbit.planning.estimate import EXPONENTS, hit_rate
from hobbit.planning.history import Run, exponents, keep, runs_of, said

RUN = Run(8.0, 10.0, 12.0, 11.0, 0.5, 0.75, True)


def test_a_run_is_kept_for_its_model() -> None:
    assert keep("model", RUN)
    assert [replace(run, date="") for run in runs_of("model")] == [RUN]
    assert runs_of("model")[0].date
    assert runs_of("another") == []


def test_the_oldest_runs_go() -> None:
    for number in range(history._KEPT_RUNS + 3):
        keep("model", replace(RUN, measured=float(number + 1)))
    kept = runs_of("model")
    assert len(kept) == history._KEPT_RUNS
    assert kept[-1].measured == history._KEPT_RUNS + 3


def test_the_models_not_used_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_KEPT_MODELS", 2)
    for name in ("a", "b", "a", "c"):
        keep(name, RUN)
    assert [bool(runs_of(name)) for name in ("a", "b", "c")] == [True, False, True]


def test_damage_is_no_run() -> None:
    keep("model", RUN)
    everything = recall(history.FILE, state_folder)
    (key,) = everything
    everything[key] += [{"measured": 1}, "x", None]
    everything[key] += [everything[key][0] | change for change in ({"share": "x"}, {"hit": None})]
    everything[key] += [everything[key][0] | change for change in ({"measured": "9"}, {"hit": 7})]
    remember(history.FILE, everything, state_folder)
    assert len(runs_of("model")) == 1
    state_folder().joinpath(history.FILE).write_text("[" * 10)
    assert runs_of("model") == []


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_STATE", "/proc/nowhere")
    assert not keep("model", RUN)
    assert runs_of("model") == []


def test_hits_of_runs_take_the_place_of_what_is_assumed() -> None:
    assert exponents([]) == EXPONENTS
    assert exponents([replace(RUN, exact=False)]) == EXPONENTS  # its bytes say nothing of hits
    assert exponents([replace(RUN, share=1.0, hit=1.0)]) == EXPONENTS
    found = exponents([replace(RUN, share=0.5, hit=hit) for hit in (0.9, 0.8, 0.7)])
    assert hit_rate(0.5, found.mid) == pytest.approx(0.8)
    assert hit_rate(0.5, found.low) < 0.7
    assert hit_rate(0.5, found.high) > 0.9


def test_only_a_prediction_far_off_is_missed() -> None:
    assert not RUN.is_missed
    assert RUN.error == pytest.approx(0.1)
    assert not replace(RUN, measured=7.9).is_missed  # outside the range, but by a fifth
    assert replace(RUN, measured=7.0).is_missed
    assert not replace(RUN, predicted_low=5.0, measured=7.0).is_missed
    assert replace(RUN, measured=14.0).is_missed


def test_errors_in_words() -> None:
    assert said([]) == "no run here yet"
    assert said([RUN]) == "the last run here was +10 %"
    assert said([RUN, replace(RUN, measured=9.0)]) == "the last 2 runs here were -10 to +10 %"


def test_the_state_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_folder() == Path.home() / ".local" / "state" / "hobbit"
    monkeypatch.setenv("XDG_STATE_HOME", "")  # as if it were not set
    assert state_folder() == Path.home() / ".local" / "state" / "hobbit"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "hobbit"
    monkeypatch.setenv("HOBBIT_STATE", str(tmp_path / "own"))
    assert state_folder() == tmp_path / "own"
