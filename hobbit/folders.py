"""Where hobbit keeps what it makes, and small things that it remembers.

What can be made again is in the cache folder, what only time brings (the last run, how predictions
fared) in the state folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return the folder, which may not exist yet: HOBBIT_CACHE, or hobbit in the user's cache."""
    own, shared = os.environ.get("HOBBIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "hobbit"


def state_folder() -> Path:
    """Return the folder, which may not exist yet: HOBBIT_STATE, or hobbit in the user's state."""
    own, shared = os.environ.get("HOBBIT_STATE"), os.environ.get("XDG_STATE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".local" / "state") / "hobbit"


def place(name: str, folder: Callable[[], Path] = cache_folder) -> Path | None:
    """Return where a file of that name is kept, its folder made; None where that cannot be."""
    try:
        path = folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return None
    return path


def recall(name: str, folder: Callable[[], Path] = cache_folder) -> dict[str, Any]:
    """Return what was remembered under a name; nothing where that is absent or unreadable."""
    try:
        found = json.loads((folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # no home, or nested without end
        return {}
    return found if isinstance(found, dict) else {}


def remember(name: str, data: dict[str, Any], folder: Callable[[], Path] = cache_folder) -> bool:
    """Write it whole or not at all; False, and no harm done, where the folder is not writable."""
    part: str | None = None
    try:
        path = place(name, folder)
        if path is None:
            return False
        number, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(number, "w", encoding="utf-8") as file:
            json.dump(data, file)
        os.replace(part, path)
    except OSError:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
        return False
    return True
