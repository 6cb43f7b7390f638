"""The head of a precision schedule: what run it is of. The rest is for native/schedule.c."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ModelError, UsageError

_MAGIC = b"HBSCHED1"
_MAX_NOTE = 1 << 16


def read_note(path: Path) -> dict[str, Any]:
    """Return the note that the recording run left."""
    try:
        with path.open("rb") as file:
            magic, length = file.read(8), int.from_bytes(file.read(4), "little")
            note = json.loads(file.read(min(length, _MAX_NOTE))) if magic == _MAGIC else None
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError:
        note = None
    if not isinstance(note, dict):
        raise ModelError(f"{path}: is not a precision schedule, as --record writes it")
    return note
