"""Where hobbit keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder, which may not exist yet: HOBBIT_CACHE, or hobbit in the user's cache."""
    own, shared = os.environ.get("HOBBIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "hobbit"
