"""Pictures of what hobbit reported as JSON: a token's time, and KL against bytes.

The files may have been made by hand or by another version: what is missing is one clear error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import calibration
from ..errors import HobbitError, ModelError, UsageError
from ..plot import Mark
from ..report import SCHEMA as EVAL_SCHEMA
from ..report import calibration_marks
from . import Bars, Picture, Points

# What a token's time is called in the pictures, and by `hobbit bench`.
_BENCH_PARTS = {
    "compute_s": "experts",
    "stall_s": "waiting",
    "predict_s": "predicting",
    "manage_s": "cache",
    "device_wait_s": "the device",
    "rest_s": "the rest",
}


def of_json(path: Path) -> list[Picture]:
    """Return what a report of `run`, `bench` or `eval`, or a calibration, shows.

    Raises UsageError for a file that is none of these, ModelError for one that is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError:
        data = None
    try:
        if isinstance(data, list) and data and "breakdown" in data[0]:
            return _bench(data)
        if isinstance(data, dict) and "quantiles" in data:
            return _calibration(path)
        if isinstance(data, dict) and data.get("schema") == EVAL_SCHEMA:
            return [_eval(data)]
        if isinstance(data, dict) and data.get("token"):
            return [_time("a token's time", data["token"], 0.0)]
    except HobbitError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"{path}: is not as hobbit wrote it: {exc!r}") from exc
    raise UsageError(
        f"{path}: nothing in it can be drawn: give a trace, a calibration, or the JSON of "
        "hobbit run (of a model that streams), bench or eval"
    )


def _time(title: str, parts: Mapping[str, float], full: float) -> Bars:
    """Show milliseconds by part."""
    total = sum(parts.values())
    return Bars(f"{title}: {total:.1f} ms", tuple(parts), tuple(parts.values()), "ms", full)


def _bench(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Show the rows that say where the time goes, all on one scale."""
    found = [row for row in rows if row["breakdown"]["compute_s"] is not None]
    if not found:
        raise UsageError("no arm says where its time goes: stock does not")
    full = max(1e3 * row["breakdown"]["total_s"] for row in found)
    return [
        _time(
            f"{row['mode']}, {row['test']}: a token's time",
            _parts(row["breakdown"]),
            full,
        )
        for row in found
    ]


def _parts(breakdown: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds by name; a device's only where there was one."""
    found = {name: 1e3 * breakdown.get(part, 0.0) for part, name in _BENCH_PARTS.items()}
    return {n: ms for n, ms in found.items() if ms or n != _BENCH_PARTS["device_wait_s"]}


def _eval(data: Mapping[str, Any]) -> Points:
    marks = [
        Mark(row["mode"], float(row["bytes_per_token"]), float(row["kl"]), float(row["kl_se"]))
        for row in data["modes"]
        if row["kl"] is not None
    ]
    return Points("KL against bytes read", tuple(marks))


def _calibration(path: Path) -> list[Picture]:
    known = calibration.load(path)
    assert known is not None  # it was just read
    marks, curve = calibration_marks(known)
    return [Points(f"KL against bytes read, as calibrated on {known.text}", (*marks,), (*curve,))]
